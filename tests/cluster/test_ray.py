"""Workers of a real Ray cluster on this machine: the same sums, and what happens when one is lost.

All share one cluster, which starts in a few seconds.
"""

import io
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from rich.console import Console
from test_pool import check_same

import tappa
from conftest import STORE
from pools import (
    TEXTS,
    broken,
    dies_first,
    pid,
    raises_until,
    refused,
    times_two,
    waits_first,
)
from tappa.analysis import Analysis, shards_of
from tappa.cluster import ModelSource, Placement, analyze_texts, calibrate_by, open_pool
from tappa.cluster.analyze import _Shard, do_pieces
from tappa.cluster.pieces import Pieces
from tappa.cluster.pool import Failed, Finished, call
from tappa.errors import ClusterError, ModelError, TextError
from tappa.layer_statistics import Settings
from tappa.pruning import Windows, calibrate_on
from tappa.texts import encode_texts
from tiny import save_tiny

ray_pool = pytest.importorskip("tappa.cluster.ray_pool")
pytestmark = [
    pytest.mark.xdist_group("ray"),
    pytest.mark.usefixtures("one_thread"),
    # Ray forgets to close sockets and files of processes that it starts
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    folder = save_tiny(tmp_path_factory.mktemp("ray") / "model")
    return ModelSource(str(folder), device="cpu")


@pytest.fixture(scope="module")
def workers(cluster: Any, source: ModelSource) -> Iterator[Any]:
    """A pool for all, since workers take seconds to start."""
    with open_pool(source, Placement(2, cluster.address), Console(file=io.StringIO())) as found:
        yield found


@pytest.fixture
def pool(workers: Any) -> Any:
    """Two workers, of which nothing is told yet."""
    workers.retried.clear()
    return workers


@pytest.fixture(scope="module")
def whole(source: ModelSource) -> Analysis:
    assert torch.get_num_threads() == 1
    return tappa.analyze(*source.load(), TEXTS)


def test_the_analysis_does_not_depend_on_the_number_of_workers(
    pool: Any, source: ModelSource, whole: Analysis
) -> None:
    for workers in (1, 2, 3):
        pool.workers = workers
        check_same(analyze_texts(pool, TEXTS), whole)
    pool.workers = 2
    assert pool.retried == []
    model, tokenizer = source.load()
    windows = Windows.of(model, tokenizer, " ".join(TEXTS), window=31, stride=17)
    mine, theirs = calibrate_by(pool, model, windows), calibrate_on(model, windows)
    for name in ("cosines", "similarity", "output"):
        np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name))


def test_an_interrupt_lets_jobs_at_hand_finish(pool: Any) -> None:
    """A real one; the same workers go on with the others."""
    jobs, found = {f"job {n}": n for n in range(300)}, []
    for done in pool.run(times_two, jobs):
        found.append(done)
        if len(found) == 5:
            os.kill(os.getpid(), signal.SIGINT)
    assert 5 <= len(found) < 300
    assert pool.retried == []
    left = {name: n for name, n in jobs.items() if Finished(name, 2 * n) not in found}
    assert len(left) == 300 - len(found)
    found += pool.run(times_two, left)
    assert sorted(done.result for done in found) == [2 * n for n in range(300)]


def test_a_worker_that_is_killed_in_the_middle(
    pool: Any, source: ModelSource, whole: Analysis, tmp_path: Path
) -> None:
    """The same sums, and the shards that were done are not done again."""
    tokenizer = source.load().tokenizer
    shards = shards_of([np.array(ids) for ids in encode_texts(tokenizer, TEXTS)])
    jobs = {
        f"shard {n}": (tmp_path / "notes", _Shard(source, shard, Settings(), None))
        for n, shard in enumerate(shards)
    }
    added: list[int] = []

    class Watched(Pieces[Analysis]):
        def add(self, number: int, piece: Analysis) -> None:
            added.append(number)
            super().add(number, piece)

    pieces = Watched(len(shards), Analysis.merge, lambda a, path: None, lambda path: whole)
    do_pieces(pool, dies_first, jobs, pieces, lambda *numbers: None)
    check_same(pieces.result(), whole)
    assert sorted(added) == list(range(len(shards)))
    assert len(pool.retried) == 1
    assert "attempt 1 of 3: its worker was lost (ActorDiedError)" in pool.retried[0]


def test_tasks_that_raise(pool: Any, tmp_path: Path) -> None:
    jobs = {f"job {n}": (tmp_path / f"notes-{n}", n) for n in (0, 2, 3)}
    found = {done.name: done for done in pool.run(raises_until, jobs)}
    assert found["job 0"] == Finished("job 0", 1)
    assert found["job 2"] == Finished("job 2", 3)
    assert found["job 3"] == Failed("job 3", "RuntimeError: call 3")
    assert len(pool.retried) == 2 + 3
    with pytest.raises(ClusterError, match="broken: KeyError: 'broken'"):
        call(pool, broken, None)
    with pytest.raises(TextError, match="too short"):
        call(pool, refused, None)
    with pytest.raises(ModelError, match="no such model"):
        analyze_texts_of(pool, ModelSource("/nowhere/at/all"))
    pids = {done.result for done in pool.run(pid, {f"job {n}": None for n in range(6)})}
    assert 1 <= len(pids) <= 3
    assert os.getpid() not in pids


def analyze_texts_of(pool: Any, source: ModelSource) -> Analysis:
    """With another model in the same workers."""
    before, pool.source = pool.source, source
    try:
        return analyze_texts(pool, TEXTS)
    finally:
        pool.source = before


def test_a_node_that_is_lost(
    cluster: Any, workers: Any, source: ModelSource, tmp_path: Path
) -> None:
    """Its job is done by the other worker, although the cluster is too small for a new one."""
    node = cluster.add_node(num_cpus=2, object_store_memory=STORE)
    pool = ray_pool.RayPool(source, Placement(2, cpus=2))  # of the cluster in use
    try:
        notes, go = [tmp_path / f"notes-{n}" for n in range(2)], tmp_path / "go"

        def lose() -> None:
            """The node, as soon as both workers are at work."""
            while not all(file.exists() for file in notes):
                time.sleep(0.05)
            cluster.remove_node(node, allow_graceful=False)
            pids = [int(file.read_text()) for file in notes]
            while all(psutil.pid_exists(number) for number in pids):
                time.sleep(0.05)  # a worker ends soon after its node
            go.touch()

        losing = threading.Thread(target=lose)
        losing.start()
        found = list(pool.run(waits_first, {file.name: (file, go) for file in notes}))
        losing.join()
        assert all(isinstance(done, Finished) for done in found)
        assert len(found) == 2
        assert len(pool.retried) == 1
        assert "attempt 1 of 3: its worker was lost" in pool.retried[0]
        jobs = {f"job {n}": n for n in range(4)}
        assert sorted(done.result for done in pool.run(times_two, jobs)) == [0, 2, 4, 6]
    finally:
        pool.close()


# ---- what cannot be had


def test_more_than_the_cluster_has(workers: Any, source: ModelSource) -> None:
    for placement, words in (
        (Placement(99, gpus=0.0), "room for 99 workers with 1 CPU each.* for"),
        (Placement(2, gpus=1.0), "room for 2 workers with 1 GPU each.* for 0"),
        (Placement(1, cpus=99), "room for 1 workers with 99 CPU each"),
    ):
        with pytest.raises(ClusterError, match=words):
            ray_pool.RayPool(source, placement)


@pytest.mark.parametrize("address", ["nowhere", "host:", ":6379", "a:b", "host:0", "host:70000"])
def test_addresses_that_are_none(source: ModelSource, address: str) -> None:
    with pytest.raises(ClusterError, match="expected the address auto or HOST:PORT"):
        ray_pool.RayPool(source, Placement(2, address))


def test_an_address_that_does_not_answer(source: ModelSource) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ClusterError, match=f"no Ray cluster answers at {address}: Connection"):
        ray_pool.RayPool(source, Placement(2, address))


def test_the_private_ray_of_another_command_is_no_cluster(
    source: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would end with that command."""
    ended: list[bool] = []
    monkeypatch.setattr(ray_pool.ray, "init", lambda *_, **__: None)
    monkeypatch.setattr(
        ray_pool.ray, "cluster_resources", lambda: {"CPU": 2.0, ray_pool.PRIVATE: 1}
    )
    monkeypatch.setattr(ray_pool.ray, "shutdown", lambda: ended.append(True))
    with pytest.raises(ClusterError, match="found at auto is that of another command"):
        ray_pool.RayPool(source, Placement(2, "auto"))
    assert ended == [True]


def test_versions_are_compared_by_name() -> None:
    ours = ray_pool.versions()
    assert {"python", "torch", "ray", "host"} <= ours.keys()
    ray_pool.check_versions(ours, ours | {"host": "elsewhere"})
    theirs = ours | {"torch": "1.0", "python": "3.9.0", "host": "node7"}
    with pytest.raises(ClusterError, match=r"on node7 has python 3\.9\.0 .*, torch 1\.0 instead"):
        ray_pool.check_versions(ours, theirs)
