"""Ctrl-C in the middle of work that is worth finishing."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def finish_first() -> Iterator[Callable[[], bool]]:
    """The first interrupt only sets a flag; the second is a KeyboardInterrupt."""
    seen = 0

    def note(*args: object) -> None:
        nonlocal seen
        seen += 1
        if seen > 1:
            raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGINT, note)
    except ValueError:  # not in the main thread
        yield lambda: False
        return
    try:
        yield lambda: seen > 0
    finally:
        signal.signal(signal.SIGINT, before)
