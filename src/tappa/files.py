"""Writing files so that nothing half-written is ever left behind."""

import hashlib
import json
import math
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tappa.arguments import path_of
from tappa.errors import OutputError


def write_atomic(path: str | Path, data: str | bytes) -> Path:
    """Write `data` (text as UTF-8) to `path`: the old content or all of the new, never a part.

    The data goes to a temporary file in the same folder, is flushed to the disk, and takes the
    place of `path` in one step. Returns the path. Raises OutputError when that is not possible.
    """
    path = path_of(path, OutputError)
    content = data.encode("utf-8") if isinstance(data, str) else data
    try:
        target = path.resolve()  # a link stays one: its target is replaced
        if target.exists() and not target.is_file():
            raise OutputError(f"cannot write {path}: not a regular file")
        part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
        try:
            with part.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot write {path}: {_reason(error)}") from error
    return path


def digest_of(*parts: Any) -> str:
    """A short fingerprint of anything that can be written as JSON."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def difference(known: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """The first entry in which two descriptions differ once they are JSON, in words."""
    wanted = json.loads(json.dumps(wanted))
    for key in sorted(wanted.keys() | known.keys()):
        if known.get(key) != wanted.get(key):
            return f"{key} is {known.get(key)!r} there and {wanted.get(key)!r} now"
    return None


def finite(x: Any) -> Any:
    """The same nested lists and dictionaries with None for NaN and infinity: JSON has neither."""
    if isinstance(x, dict):
        return {key: finite(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def check_writable_folder(path: str | Path) -> Path:
    """Check that a file can be created in the folder `path`, or in its nearest parent that exists.

    Call it before a long run whose results go there; nothing is left behind. Raises OutputError.
    """
    folder = Path(path)
    try:
        there = folder.absolute()
        while not there.exists():
            there = there.parent
        with tempfile.TemporaryFile(dir=there):
            pass
    except (OSError, ValueError) as error:
        message = f"cannot write to the folder {folder}: {_reason(error)}"
        raise OutputError(message) from error
    return folder


def ensure_folder(path: str | Path) -> Path:
    """Create the folder `path` where it is missing. Raises OutputError."""
    folder = check_writable_folder(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot write to the folder {folder}: {_reason(error)}") from error
    return folder


@contextmanager
def made_folder(path: str | Path) -> Iterator[Path]:
    """The folder `path`, created where it is missing; an error leaves no new folder that is empty.

    So a disk that is full, or a run that is refused, leaves nothing behind. Raises OutputError.
    """
    folder = Path(path)
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        yield ensure_folder(folder)
    except BaseException:
        for one in missing:
            with suppress(OSError):  # it has files
                one.rmdir()
        raise


def _reason(error: OSError | ValueError) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return text[:1].lower() + text[1:]
