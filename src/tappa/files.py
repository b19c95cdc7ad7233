"""Writing files so that nothing half-written is ever left behind."""

import os
import secrets
import tempfile
from pathlib import Path

from tappa.errors import OutputError


def write_atomic(path: str | Path, data: str | bytes) -> Path:
    """Write `data` (text as UTF-8) to `path`: the old content or all of the new, never a part.

    The data goes to a temporary file in the same folder, is flushed to the disk, and takes the
    place of `path` in one step. Returns the path. Raises OutputError when that is not possible.
    """
    path = Path(path)
    content = data.encode("utf-8") if isinstance(data, str) else data
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        try:
            with part.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot write {path}: {_reason(error)}") from error
    return path


def ensure_writable_folder(path: str | Path) -> Path:
    """Create the folder `path` where it is missing, and check that a file can be created in it.

    Call it before a long run whose results go there. Raises OutputError.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        message = f"cannot write to the folder {folder}: {_reason(error)}"
        raise OutputError(message) from error
    return folder


def _reason(error: OSError | ValueError) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return text[:1].lower() + text[1:]
