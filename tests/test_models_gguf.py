import json
import logging

import pytest
import torch

from loading import PROMPT, refusal
from tappa import models
from tappa.models import load
from tiny import save_tiny_gguf, tiny_model


@pytest.fixture
def gguf_file(tmp_path):
    path = tmp_path / "tiny.gguf"
    save_tiny_gguf(path)
    return path


def test_a_gguf_file_is_converted_once(gguf_file, cache, caplog, capfd, monkeypatch):
    original = tiny_model("qwen2")
    model, tokenizer = load(str(gguf_file))
    assert torch.equal(model(PROMPT).logits, original(PROMPT).logits)
    assert tokenizer.decode(tokenizer("the hat\n").input_ids) == "the hat\n"
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert f"converting {gguf_file} once" in caplog.text
    assert capfd.readouterr().err == ""
    assert model.name_or_path == str(gguf_file)

    [kept] = (cache / "converted").iterdir()  # nothing temporary is left
    assert "quantization_config" not in json.loads((kept / "config.json").read_text())
    monkeypatch.setattr(models, "read_gguf", lambda *_: pytest.fail("it was converted again"))
    moved = gguf_file.rename(gguf_file.with_name("tiny.GGUF"))
    again, again_tokenizer = load(str(moved))
    assert torch.equal(again(PROMPT).logits, original(PROMPT).logits)
    assert again_tokenizer("the hat\n").input_ids == tokenizer("the hat\n").input_ids


def test_a_changed_gguf_file_is_converted_again(gguf_file, cache):
    load(str(gguf_file))
    content = bytearray(gguf_file.read_bytes())
    content[-40] ^= 1
    gguf_file.write_bytes(content)
    load(str(gguf_file))
    assert len(list((cache / "converted").iterdir())) == 2


def test_a_conversion_overtaken_by_another_process_uses_its_copy(gguf_file, cache, monkeypatch):
    read = models.read_gguf

    def overtaken(*arguments):
        monkeypatch.setattr(models, "read_gguf", read)
        models._converted(gguf_file, "the faster one")
        return read(*arguments)

    monkeypatch.setattr(models, "read_gguf", overtaken)
    model, _ = load(str(gguf_file))
    assert torch.equal(model(PROMPT).logits, tiny_model("qwen2")(PROMPT).logits)
    assert len(list((cache / "converted").iterdir())) == 1


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.5, 0.99])
def test_a_cut_gguf_file(gguf_file, cache, share):
    content = gguf_file.read_bytes()
    gguf_file.write_bytes(content[: int(share * len(content))])
    message = refusal(gguf_file)
    assert f"GGUF file {gguf_file}: it" in message or share < 0.001
    assert not cache.exists() or not list((cache / "converted").iterdir())


def test_a_text_that_is_called_gguf(tmp_path, cache):
    path = tmp_path / "text.gguf"
    path.write_text("once upon a time" * 99)
    assert "does not start with GGUF" in refusal(path)


def test_without_a_writable_cache_a_gguf_file_is_read_each_time(gguf_file, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TAPPA_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot keep a converted copy"):
        model, _ = load(str(gguf_file), dtype="bfloat16", attn_implementation="eager")
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    model.save_pretrained(tmp_path / "saved")  # it does not pass for a quantised one
    assert (tmp_path / "saved" / "model.safetensors").is_file()


def test_a_damaged_copy_is_made_anew(gguf_file, cache):
    load(str(gguf_file))
    [kept] = (cache / "converted").iterdir()
    weights = kept / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    model, _ = load(gguf_file, device=torch.device("cpu"))
    assert torch.equal(model(PROMPT).logits, tiny_model("qwen2")(PROMPT).logits)
    assert [folder.name for folder in (cache / "converted").iterdir()] == [kept.name]
