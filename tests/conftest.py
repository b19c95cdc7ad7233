import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))  # before triton

import tappa.kernels
import tappa.models
from kernel_checks import poisoned
from shift import shift_all
from tappa.cli import main
from tappa.kernels import launching
from tappa.models import LoadedModel

pytest_plugins = ["not_run"]
Run = Callable[..., tuple[int, str, str]]
# there are no wheels of Triton for every platform
collect_ignore = ["kernels"] if importlib.util.find_spec("triton") is None else []
STORE = 80 * 2**20  # bytes of shared memory of a node of Ray
# one for each xdist worker: more of them only wait for each other
torch.set_num_threads(int(os.environ.get("TAPPA_TEST_THREADS", "1")))
SHIFT = float(os.environ.get("TAPPA_TEST_SHIFT", "0"))
if SHIFT:
    shift_all(SHIFT)


def pytest_configure(config: pytest.Config) -> None:
    """Markers of our own."""
    told = "what is compared ran the same kernels: equal to the bit, on any machine"
    config.addinivalue_line("markers", f"same_kernel: {told}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """No claim of equal bits where every number is shifted."""
    if SHIFT:
        equal = [item for item in items if item.get_closest_marker("same_kernel")]
        config.hook.pytest_deselected(items=equal)
        items[:] = [item for item in items if item not in equal]


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    """The default model. Mark its tests with `xdist_group("smollm2")`: one load for all."""
    return tappa.models.load()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty folder in the place of tappa's cache."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("TAPPA_CACHE", str(folder))
    return folder


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers hold NaN before they are written."""
    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture
def on_kernels(monkeypatch: pytest.MonkeyPatch, poison: None) -> list[str]:
    """Kernels serve here too (interpreted if there is no GPU), and buffers are poisoned.

    Gives the names of those that ran.
    """
    ran: list[str] = []
    attempt = tappa.kernels._attempt

    def noted(kernel: str, *arguments: Any) -> Any:
        result = attempt(kernel, *arguments)
        if result is not None:
            ran.append(kernel)
        return result

    monkeypatch.setattr(launching, "runs_on", lambda x: True)
    monkeypatch.setattr(tappa.kernels, "_attempt", noted)
    monkeypatch.setattr(launching, "FAILED", set())
    return ran


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """As workers have: sums in the same order as theirs, to the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A Ray cluster on this machine: a head with five CPUs, to which nodes can be added.

    Mark its tests with `xdist_group("ray")`: one cluster for all.
    """
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        node = {"num_cpus": 5, "object_store_memory": STORE, "include_dashboard": False}
        found = Cluster(initialize_head=True, head_node_args=node)
        yield found
        found.shutdown()


@pytest.fixture
def as_users_run_it() -> Iterator[None]:
    """Without the type checks of the tests, which would be faster to refuse."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cache: Path) -> Run:
    """Call the command: (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tappa", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        code = exit_.value.code or 0
        assert isinstance(code, int)
        return code, captured.out, captured.err

    return call
