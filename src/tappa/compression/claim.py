"""One thread at a time on a cache."""

import threading
from typing import NoReturn

from tappa.errors import CompressionError


class Claim:
    """Held by the thread that uses a cache, which may take it again meanwhile.

    A second thread does not wait, which could only mix two texts later on: it is refused.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def take(self) -> None:
        """Raises CompressionError if another thread holds it."""
        if not self._lock.acquire(blocking=False):
            self.refuse()

    def refuse(self) -> NoReturn:
        """Raises CompressionError."""
        raise CompressionError(
            "this cache is in use by another thread: give each thread a cache of its own"
        )

    def give_back(self) -> None:
        """Once for each time that it was taken."""
        self._lock.release()

    def __enter__(self) -> None:
        self.take()

    def __exit__(self, *_: object) -> None:
        self.give_back()
