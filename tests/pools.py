"""A pool whose worker is this process but which is used as if it was elsewhere, and tasks for it.

The tasks stand here, in a module, so that workers of a Ray cluster find them too.
"""

import os
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tappa.analysis import Analysis
from tappa.cluster.analyze import _analyze_shard
from tappa.cluster.pool import Failed, Finished, InProcess, ModelSource, Pool, Task, Worker
from tappa.errors import TextError
from tappa.files import write_atomic

TEXTS = [
    "It is a truth universally acknowledged, that a single man in possession of a good fortune"[n:]
    for n in (0, 2, 3, 5, 7, 11, 13)
]


class Elsewhere(Pool):
    """Runs jobs in the order given by `order`; those named in `broken` raise, at every attempt."""

    workers = 2

    def __init__(self, source: ModelSource, broken: tuple[str, ...] = (), stop: int = 99) -> None:
        self.source, self.inner, self.broken, self.stop = source, InProcess(source), broken, stop
        self.done: list[str] = []

    @property
    def retried(self) -> list[str]:  # type: ignore[override]
        """Of the pool inside."""
        return self.inner.retried

    def run(self, task: Task, jobs: Mapping[str, Any]) -> Iterator[Finished | Failed]:
        """The last job first; `stop` of them at most."""
        for name in list(jobs)[::-1]:
            if len(self.done) >= self.stop:
                return
            wanted = broken if name in self.broken else task
            if " " in name:  # no preparation
                self.done.append(name)
            yield from self.inner.run(wanted, {name: jobs[name]})

    def close(self) -> None:
        """Nothing."""


def broken(worker: Worker, payload: Any) -> Any:
    """Raises what nobody expects."""
    raise KeyError("broken")


def refused(worker: Worker, payload: Any) -> Any:
    """Raises what its caller must put right."""
    raise TextError("too short")


def times_two(worker: Worker, payload: int) -> int:
    """A result."""
    return 2 * payload


def pid(worker: Worker, payload: Any) -> int:
    """Of the worker's process."""
    return os.getpid()


def raises_until(worker: Worker, payload: tuple[Path, int]) -> int:
    """Raises as often as is said, then returns how often it was called."""
    notes, times = payload
    calls = len(list(notes.parent.glob(f"{notes.name}*"))) + 1
    notes.with_name(f"{notes.name}-{calls}").touch()
    if calls <= times:
        raise RuntimeError(f"call {calls}")
    return calls


def waits_first(worker: Worker, payload: tuple[Path, Path]) -> int:
    """At the first call it says in which process it runs, and goes on when it may."""
    notes, go = payload
    if not notes.exists():
        write_atomic(notes, str(os.getpid()))
        for _ in range(1200):
            if go.exists():
                break
            time.sleep(0.05)
    return os.getpid()


def dies_first(worker: Worker, payload: tuple[Path, Any]) -> Analysis:
    """Analyses a shard; at the first call its process is killed in the middle of it."""
    notes, shard = payload
    found = _analyze_shard(worker, shard)
    if not notes.exists():
        notes.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return found
