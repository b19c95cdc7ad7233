"""A checkpoint folder is written whole or not at all."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from tappa.errors import OutputError
from tappa.pruning import check_target, save_checkpoint
from tiny import save_tiny, tiny_model, tiny_tokenizer


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_files_come_with_it(tmp_path: Path) -> None:
    out = save_checkpoint(
        tiny_model("llama"), tiny_tokenizer(), tmp_path / "a" / "b", files={"README.md": "é"}
    )
    assert (out / "README.md").read_text(encoding="utf-8") == "é"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(names(out))
    assert names(tmp_path / "a") == ["b"]
    AutoModelForCausalLM.from_pretrained(out)


def test_nothing_is_overwritten_without_force(tmp_path: Path) -> None:
    old = save_tiny(tmp_path / "old", "qwen2")
    before = {name: (old / name).read_bytes() for name in names(old)}
    with pytest.raises(OutputError, match="not empty"):
        save_checkpoint(tiny_model("llama"), tiny_tokenizer(), old)
    assert {name: (old / name).read_bytes() for name in names(old)} == before
    (tmp_path / "empty").mkdir()
    assert check_target(tmp_path / "empty") == tmp_path / "empty"


def test_force_replaces_a_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    old = save_tiny(tmp_path / "old", "qwen2")
    (old / "model-00002-of-00002.safetensors").write_bytes(b"left over")
    save_checkpoint(tiny_model("llama"), tiny_tokenizer(), old, force=True)
    assert AutoModelForCausalLM.from_pretrained(old).config.model_type == "llama"
    assert "model-00002-of-00002.safetensors" not in names(old)
    with pytest.raises(OutputError, match="is the model that is pruned"):
        check_target(old, force=True, source=tmp_path / "x" / ".." / "old")
    for other in ("notes.txt", "runs"):
        (old / other).mkdir()
        with pytest.raises(OutputError, match=f"also holds {other}"):
            save_checkpoint(tiny_model("llama"), tiny_tokenizer(), old, force=True)
        (old / other).rmdir()
    assert names(tmp_path) == ["old"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(OutputError, match="never replaced"):
        save_checkpoint(tiny_model("llama"), tiny_tokenizer(), tmp_path / "thesis", force=True)
    assert names(tmp_path / "thesis") == ["chapter.txt"]
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(old)
    for target in ("file", "link"):
        with pytest.raises(OutputError, match="not a folder"):
            check_target(tmp_path / target, force=True)


@pytest.mark.parametrize("target", ["new", "old"])
def test_a_full_disk_leaves_everything_as_it_was(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = save_tiny(tmp_path / "old", "qwen2")
    before = {name: (old / name).read_bytes() for name in names(old)}
    model: Any = tiny_model("llama")
    whole = model.save_pretrained

    def fill(folder: Path, **options: Any) -> None:
        whole(folder, **options)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(model, "save_pretrained", fill)
    with pytest.raises(OutputError, match="No space left"):
        save_checkpoint(model, tiny_tokenizer(), tmp_path / target, force=True)
    assert names(tmp_path) == ["old"]
    assert {name: (old / name).read_bytes() for name in names(old)} == before


def test_too_little_space_is_seen_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OutputError, match="MiB are needed"):
        save_checkpoint(tiny_model("llama"), tiny_tokenizer(), tmp_path / "new")
    assert names(tmp_path) == []


def test_an_interrupt_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_model("llama")

    def stop(folder: Path, **options: Any) -> None:
        (Path(folder) / "half").write_text("x")
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "save_pretrained", stop)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(model, tiny_tokenizer(), tmp_path / "new")
    assert names(tmp_path) == []
