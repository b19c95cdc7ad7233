"""Words of messages: counts with their noun, sizes in memory, what came, what was meant."""

import difflib
from collections.abc import Iterable
from typing import Any

UNITS = ("bytes", "kB", "MB", "GB", "TB")


def counted(count: int, noun: str) -> str:
    """`1 token`, `2,048 tokens`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def byte_size(count: int) -> str:
    """`640 bytes`, `11.6 MB`: powers of 1000."""
    if count < 1000:
        return counted(count, "byte")
    size, power = float(count), 0
    while size >= 999.95 and power < len(UNITS) - 1:  # what would be shown as 1000.0
        size, power = size / 1000, power + 1
    return f"{size:.1f} {UNITS[power]}"


def described(value: Any) -> str:
    """What came in the place of an argument: itself if it is short, else its kind."""
    text, kind = repr(value), type(value).__name__
    short = len(text) <= 60 and "\n" not in text
    return text if short else f"{'an' if kind[0] in 'AEIOUaeiou' else 'a'} {kind}"


def did_you_mean(wrong: str, names: Iterable[str]) -> str:
    """The end of an error: the name that is nearest to a wrong one, nothing where none is near."""
    close = difflib.get_close_matches(wrong, list(names), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
