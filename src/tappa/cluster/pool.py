"""Who does the pieces of a job: this process (InProcess), or workers of a cluster (ray_pool)."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rich.console import Console

import tappa
from tappa.checkpoint import LoadedModel, first_line
from tappa.errors import ClusterError, MissingExtraError, TappaError
from tappa.interrupts import finish_first
from tappa.tensor_parallel import rank_of_torchrun

ATTEMPTS = 3  # at a piece of work, before it counts as failed


@dataclass(frozen=True)
class ModelSource:
    """What `tappa.load` takes: every worker loads the model itself, so all must be able to."""

    name: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False

    def load(self) -> LoadedModel:
        """The model and its tokenizer. Raises ModelError."""
        return tappa.load(
            self.name,
            device=self.device,
            dtype=self.dtype,
            trust_remote_code=self.trust_remote_code,
        )


@dataclass(frozen=True)
class Placement:
    """How many workers, where, and what each of them has. Raises ClusterError."""

    workers: int = 1
    address: str | None = None  # None: processes on this machine; "auto"; HOST:PORT
    gpus: float | None = None  # for each worker; None: one where there are any
    cpus: int = 1  # for each worker: its threads

    def __post_init__(self) -> None:
        """One GPU can be shared, several cannot."""
        if self.address == "":
            raise ClusterError("expected the address auto or HOST:PORT of a cluster, got ''")
        if self.gpus is not None and not (
            0 <= self.gpus <= 1 or (self.gpus > 1 and self.gpus.is_integer())
        ):
            raise ClusterError(
                f"expected a share of one GPU or a whole number of them, got {self.gpus:g}"
            )

    @property
    def in_process(self) -> bool:
        """Whether this process does it all."""
        return self.workers == 1 and self.address is None


@dataclass
class Worker:
    """What a task gets: a model, loaded once, and room for what the next task can use."""

    kept: dict[str, Any] = field(default_factory=dict)
    _source: ModelSource | None = None
    _loaded: LoadedModel | None = None

    def model(self, source: ModelSource) -> LoadedModel:
        """The model of a source; the one of another source is let go first."""
        if self._loaded is None or source != self._source:
            self.kept.clear()
            self._loaded = None
            self._loaded, self._source = source.load(), source
        return self._loaded


Task = Callable[[Worker, Any], Any]  # a function of a module: (worker, payload) -> result


@dataclass(frozen=True)
class Finished:
    """A piece of work that is done."""

    name: str
    result: Any


@dataclass(frozen=True)
class Failed:
    """A piece of work that raised, or took its worker down, at every attempt."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class Pool(ABC):
    """Workers. `source` is the model they are for; `retried` says which attempts failed so far."""

    source: ModelSource
    workers: int
    retried: list[str]

    @abstractmethod
    def run(self, task: Task, jobs: Mapping[str, Any]) -> Iterator[Finished | Failed]:
        """Do all jobs (name -> payload), in any order; what is done is yielded at once.

        A job that raises is tried again, ATTEMPTS times in all. At the first Ctrl-C jobs at hand
        are finished and no others begun, at the second all stops. Raises the TappaError of a task
        as it is: what its caller must put right goes wrong everywhere.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of the workers."""


def call(pool: Pool, task: Task, payload: Any) -> Any:
    """The result of one task, on any worker. Raises ClusterError, and TappaErrors of the task."""
    for done in pool.run(task, {task.__name__.strip("_"): payload}):
        if isinstance(done, Failed):
            raise ClusterError(str(done))
        return done.result
    raise KeyboardInterrupt


class InProcess(Pool):
    """One worker: this process. Nothing else is needed."""

    workers = 1

    def __init__(self, source: ModelSource) -> None:
        self.source, self.worker, self.retried = source, Worker(), list[str]()

    def run(self, task: Task, jobs: Mapping[str, Any]) -> Iterator[Finished | Failed]:
        """See Pool."""
        with finish_first() as interrupted:
            for name, payload in jobs.items():
                if interrupted():
                    return
                yield self._attempt(task, name, payload)

    def _attempt(self, task: Task, name: str, payload: Any) -> Finished | Failed:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return Finished(name, task(self.worker, payload))
            except TappaError:
                raise
            except Exception as error:
                reason = f"{type(error).__name__}: {first_line(error)}"
                self.retried.append(f"{name}, attempt {attempt} of {ATTEMPTS}: {reason}")
        return Failed(name, reason)

    def close(self) -> None:
        """See Pool."""
        self.worker = Worker()


@contextmanager
def open_pool(source: ModelSource, placement: Placement, console: Console) -> Iterator[Pool]:
    """Workers for as long as the `with` lasts; at its end it tells what was tried again.

    Raises ClusterError for workers that cannot be had, MissingExtraError without Ray.
    """
    with console.status("loading the model" if placement.in_process else "starting workers"):
        pool = _in_process(source, placement) if placement.in_process else _ray(source, placement)
    try:
        yield pool
    finally:
        pool.close()
        for line in pool.retried:
            console.print(f"tried again: {line}", highlight=False, markup=False)


def _in_process(source: ModelSource, placement: Placement) -> InProcess:
    pool = InProcess(for_this_process(source, placement))
    pool.worker.model(pool.source)
    return pool


def for_this_process(source: ModelSource, placement: Placement) -> ModelSource:
    """The source with the device that a placement in process means. Raises ClusterError."""
    if not placement.in_process or placement.gpus is None:
        return source
    there = torch.cuda.device_count()
    if placement.gpus > there:
        raise ClusterError(f"expected {placement.gpus:g} GPUs, this machine has {there}")
    if source.device == "auto":
        return replace(source, device=device_for(placement.gpus))
    return source


def device_for(gpus: float) -> str:
    """The device "auto" of a worker with so many GPUs: all of them, if there are several."""
    return "all" if gpus > 1 else "cuda" if gpus else "cpu"


def _ray(source: ModelSource, placement: Placement) -> Pool:
    if rank_of_torchrun() is not None:
        raise ClusterError("expected no workers of Ray under torchrun: its processes do the work")
    try:
        from tappa.cluster.ray_pool import RayPool
    except ImportError as error:
        if error.name != "ray":
            raise
        raise MissingExtraError(
            "ray is missing: this needs the extra, pip install 'tappa[cluster]'"
        ) from error
    return RayPool(source, placement)
