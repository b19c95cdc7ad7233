"""Workers of a Ray cluster: actors that keep a model, and a driver that hands out pieces of work.

Ray starts, places and watches the actors. What is done anew after a failure is decided here, since
a piece of work is only tried so often, and what is finished is never done again.
"""

import os
import platform
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

# read when Ray is imported: no reports to its makers, and no lines of its own on our stdout
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from tappa.checkpoint import first_line
from tappa.cluster.pool import (
    ATTEMPTS,
    Failed,
    Finished,
    ModelSource,
    Placement,
    Pool,
    Task,
    Worker,
    device_for,
)
from tappa.errors import ClusterError, TappaError
from tappa.interrupts import finish_first

PACKAGES = ("tappa", "torch", "transformers", "tokenizers", "numpy", "lm_eval", "ray")
PATIENCE = 300.0  # seconds that a run waits while no worker at all is there
TICK = 0.5  # seconds between looks at the interrupt
CONNECT = 5.0  # seconds
PRIVATE = "tappa_private"  # marks a cluster of our own, which ends with its command
STORE = 512 * 2**20  # bytes of shared memory for results on their way, if the cluster is our own


class _Actor:
    """A worker in its process. It loads nothing until its first task, whose error then says why."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self.worker = Worker()

    def greet(self) -> dict[str, str]:
        """Versions, and where it is."""
        return versions()

    def do(self, task: Task, payload: Any) -> Any:
        """One piece of work."""
        return task(self.worker, payload)


@dataclass(frozen=True)
class _Ticket:
    """Something an actor is at: a job, or its greeting."""

    actor: Any
    name: str | None = None
    payload: Any = None


class RayPool(Pool):
    """Actors of a Ray cluster as workers. See Pool; `close` when done.

    Raises ClusterError for an address that does not answer, for more than the cluster has, and
    for workers with other versions of the packages that decide results.
    """

    def __init__(self, source: ModelSource, placement: Placement) -> None:
        self.source, self.workers, self.retried = source, placement.workers, list[str]()
        self._idle: list[Any] = []
        self._tickets: dict[Any, _Ticket] = {}
        self._alone_since = time.monotonic()
        self._lost_starts, self._most_lost_starts = 0, ATTEMPTS * placement.workers
        self._started = _connect(placement)
        try:
            gpus = _gpus(placement, source)
            check_room(placement.workers, {"CPU": placement.cpus, "GPU": gpus})
        except ClusterError:
            self.close()
            raise
        if source.device == "auto":
            self.source = replace(source, device=device_for(gpus))
        options = {"num_cpus": placement.cpus, "num_gpus": gpus, "max_restarts": 0}
        actor: Any = ray.remote(_Actor)
        self._new: Callable[[], Any] = lambda: actor.options(**options).remote(placement.cpus)
        self._add_actors(placement.workers)  # at once: each takes seconds to start

    def run(self, task: Task, jobs: Mapping[str, Any]) -> Iterator[Finished | Failed]:
        """See Pool."""
        waiting, attempts = deque(jobs.items()), Counter[str]()
        with finish_first() as interrupted:
            try:
                while waiting or self._at_work:
                    if interrupted():
                        waiting.clear()
                    self._hand_out(task, waiting)
                    for reference in ray.wait(list(self._tickets), timeout=TICK)[0]:
                        ticket = self._tickets.pop(reference)
                        found = self._look(reference, ticket)
                        if ticket.name is None:
                            self._note_start(found)
                            continue
                        if isinstance(found, Finished):
                            yield found
                            continue
                        attempts[ticket.name] += 1
                        count = f"attempt {attempts[ticket.name]} of {ATTEMPTS}"
                        self.retried.append(f"{ticket.name}, {count}: {found}")
                        if attempts[ticket.name] < ATTEMPTS:
                            waiting.appendleft((ticket.name, ticket.payload))
                        else:
                            yield Failed(ticket.name, found)
            finally:
                self._abandon()

    def close(self) -> None:
        """End the actors, and Ray if it was started here."""
        for actor in [*self._idle, *(ticket.actor for ticket in self._tickets.values())]:
            _end(actor)
        self._idle.clear()
        self._tickets.clear()
        if self._started:
            ray.shutdown()

    # ---- actors

    @property
    def _at_work(self) -> bool:
        return any(ticket.name is not None for ticket in self._tickets.values())

    def _hand_out(self, task: Task, waiting: deque[tuple[str, Any]]) -> None:
        """Jobs to idle actors; new actors, as many as are lacking and there is work for."""
        there = len(self._idle) + len(self._tickets)
        if self._lost_starts < self._most_lost_starts:
            self._add_actors(min(self.workers, len(self._tickets) + len(waiting)) - there)
        while self._idle and waiting:
            actor, (name, payload) = self._idle.pop(), waiting.popleft()
            self._tickets[actor.do.remote(task, payload)] = _Ticket(actor, name, payload)
        if self._at_work:
            self._alone_since = time.monotonic()
        elif time.monotonic() - self._alone_since > PATIENCE:
            raise ClusterError(f"no worker has started for {PATIENCE:.0f} seconds")

    def _add_actors(self, count: int) -> None:
        for _ in range(count):
            actor = self._new()
            self._tickets[actor.greet.remote()] = _Ticket(actor)

    def _note_start(self, found: Finished | str) -> None:
        """Raise ClusterError where all workers are lost before they start, again and again."""
        self._lost_starts = 0 if isinstance(found, Finished) else self._lost_starts + 1
        nobody = not self._tickets and not self._idle
        if nobody and self._lost_starts >= self._most_lost_starts:
            raise ClusterError(f"no worker starts: {found}")

    def _look(self, reference: Any, ticket: _Ticket) -> Finished | str:
        """What a ticket came to: a result, or what went wrong. Raises TappaErrors of tasks."""
        try:
            result = ray.get(reference)
        except RayTaskError as error:
            self._idle.append(ticket.actor)
            cause = error.cause
            if isinstance(cause, TappaError):
                raise cause from None
            return f"{type(cause).__name__}: {first_line(cause)}"
        except RayError as error:  # the worker or its node is gone, or its result is lost
            _end(ticket.actor)
            if getattr(error, "actor_init_failed", False):  # no tappa there, or a broken one
                reason = str(error).strip().splitlines()[-1]
                raise ClusterError(f"a worker cannot start: {reason}") from None
            return f"its worker was lost ({type(error).__name__})"
        if ticket.name is None:
            check_versions(versions(), result)
        self._idle.append(ticket.actor)
        return Finished(ticket.name or "", result)

    def _abandon(self) -> None:
        """After a run that ended early: what its actors are still at is of no use any more."""
        for reference, ticket in list(self._tickets.items()):
            if ticket.name is not None:
                _end(ticket.actor)
                del self._tickets[reference]


def _end(actor: Any) -> None:
    """Kill an actor, whether or not it is there."""
    with suppress(RayError):
        ray.kill(actor)


def versions() -> dict[str, str]:
    """Of what decides results, and where this is."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found | {"host": socket.gethostname()}


def check_versions(ours: dict[str, str], theirs: dict[str, str]) -> None:
    """Whether a worker runs what the driver runs. Raises ClusterError, naming what differs."""
    wrong = [
        f"{name} {theirs.get(name)} instead of {ours[name]}"
        for name in ("python", *PACKAGES)
        if theirs.get(name) != ours[name]
    ]
    if wrong:
        raise ClusterError(
            f"the worker on {theirs['host']} has {', '.join(wrong)}: install the same everywhere"
        )


def check_room(workers: int, each: Mapping[str, int | float]) -> None:
    """Whether the nodes that are alive hold so many workers. Raises ClusterError."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for what, amount in each.items():
        room = sum(int(node.get(what, 0) / amount + 1e-9) for node in nodes) if amount else workers
        if room < workers:
            there = ", ".join(f"{node.get(what, 0):g}" for node in nodes) or "none"
            raise ClusterError(
                f"expected room for {workers} workers with {amount:g} {what} each, there is room "
                f"for {room}: the nodes have {there} {what}"
            )


def _gpus(placement: Placement, source: ModelSource) -> float:
    if placement.gpus is not None:
        return placement.gpus
    wanted = source.device == "auto" or source.device.startswith("cuda")
    return 1.0 if wanted and ray.cluster_resources().get("GPU", 0) else 0.0


def _connect(placement: Placement) -> bool:
    """Connect to a cluster, or start one on this machine; whether it was started here."""
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    address = placement.address
    if address is None and ray.is_initialized():
        return False
    if address is not None and address != "auto":
        _check_address(address)
    try:
        if address is None:
            cpus = placement.workers * placement.cpus
            ray.init(
                "local",
                num_cpus=cpus,
                resources={PRIVATE: 1},
                object_store_memory=STORE,
                include_dashboard=False,
                **quiet,
            )
        else:
            ray.init(address, **quiet)
    except Exception as error:  # whatever Ray says of a cluster that it cannot reach or use
        where = "on this machine" if address in (None, "auto") else f"at {address}"
        why = first_line(error).rstrip(".").replace("`--address`", "the address")
        if address is not None and "RAY_AUTH_MODE" not in os.environ:
            why += " (one that asks for a token wants RAY_AUTH_MODE=token set here)"
        raise ClusterError(f"cannot use a Ray cluster {where}: {why}") from error
    if address is not None and PRIVATE in ray.cluster_resources():
        ray.shutdown()
        raise ClusterError(
            f"the Ray found at {address} is that of another command and ends with it: start one "
            "with 'ray start --head', or leave the address out"
        )
    return True


def _check_address(address: str) -> None:
    """HOST:PORT that answers. Raises ClusterError; Ray itself would wait for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ClusterError(f"expected the address auto or HOST:PORT of a cluster, got {address!r}")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), CONNECT):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise ClusterError(f"no Ray cluster answers at {address}: {reason}") from error
