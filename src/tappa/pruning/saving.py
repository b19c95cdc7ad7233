"""Writing a pruned model as a checkpoint folder: all of it or nothing."""

import os
import secrets
import shutil
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tappa.checkpoint import first_line, quiet
from tappa.errors import OutputError
from tappa.files import check_writable_folder, ensure_folder

# What may lie in a folder that is replaced: what transformers and tappa write into a checkpoint.
_PARTS = (
    *(
        "config.json",
        "generation_config.json",
        "model*.safetensors",
        "model.safetensors.index.json",
    ),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("chat_template*", "README.md", "pruning.json"),
)


def check_target(
    folder: str | Path, *, force: bool = False, source: str | Path | None = None
) -> Path:
    """Whether a checkpoint may go into a folder: call it before long work.

    A folder that is missing or empty will do; with `force` one that holds a checkpoint (a
    config.json) and nothing else is replaced, but never `source`, where the model comes from.
    Raises OutputError.
    """
    path = Path(folder)
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise OutputError(f"cannot write the checkpoint {path}: not a folder")
    if path.is_dir() and any(path.iterdir()):
        if not force:
            raise OutputError(
                f"{path} is not empty: choose another folder, or force=True to replace it"
            )
        if not (path / "config.json").is_file():
            raise OutputError(f"{path} holds no checkpoint (config.json): it is never replaced")
        if source is not None and path.resolve() == Path(source).resolve():
            raise OutputError(f"{path} is the model that is pruned: choose another folder")
        others = sorted(
            p.name
            for p in path.iterdir()
            if p.is_dir() or not any(p.match(part) for part in _PARTS)
        )
        if others:
            raise OutputError(
                f"{path} also holds {', '.join(others[:3])}: not replaced, choose another folder"
            )
    check_writable_folder(path.absolute().parent)
    return path


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    files: dict[str, str | bytes] | None = None,
    force: bool = False,
) -> Path:
    """Write model, tokenizer and further `files` (name: content), for plain transformers to load.

    Everything goes into a folder beside the target first, which takes its place when it is
    complete: a full disk or an interrupt leaves the target as it was. Raises OutputError.
    """
    path = check_target(folder, force=force)
    ensure_folder(path.absolute().parent)
    _check_space(model, path.absolute().parent)
    part = path.absolute().with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        part.mkdir()
        with quiet():
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
        for name, content in (files or {}).items():
            data = content.encode("utf-8") if isinstance(content, str) else content
            (part / name).write_bytes(data)
        _swap(part, path.absolute())
    except OutputError:
        raise
    except Exception as error:  # whatever safetensors and the file system raise
        reason = getattr(error, "strerror", None) or first_line(error)
        raise OutputError(f"cannot write the checkpoint {path}: {reason}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return path


def _check_space(model: PreTrainedModel, parent: Path) -> None:
    parameters = {id(p): p for p in model.parameters()}.values()
    needed = sum(p.numel() * p.element_size() for p in parameters)
    free = shutil.disk_usage(parent).free
    if free < needed * 1.02 + 2**20:
        raise OutputError(
            f"cannot write the checkpoint: {needed / 2**20:.0f} MiB are needed in {parent}, "
            f"{free / 2**20:.0f} MiB are free"
        )


def _swap(part: Path, path: Path) -> None:
    """Put a complete folder in the place of the target."""
    if not path.exists():
        part.rename(path)
        return
    old = path.with_name(f".{path.name}.{secrets.token_hex(4)}.old")
    os.rename(path, old)
    try:
        part.rename(path)
    except BaseException:
        os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)
