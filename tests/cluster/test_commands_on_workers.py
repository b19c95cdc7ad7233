"""`tappa analyze`, `eval` and `prune` with `--workers 2` on a real Ray cluster: as one process."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_grid_on_workers import check_same as check_same_grid

from conftest import STORE, Run
from pools import TEXTS
from tappa.report.views import load_views
from tiny import save_tiny

ray_pool = pytest.importorskip("tappa.cluster.ray_pool")
pytestmark = [
    pytest.mark.xdist_group("ray"),
    pytest.mark.usefixtures("one_thread"),
    # Ray forgets to close sockets and files of processes that it starts
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
COMMANDS = ("analyze", "eval", "prune")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With layers enough to take a while."""
    return save_tiny(tmp_path_factory.mktemp("commands") / "model", num_hidden_layers=5)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(20):
        (folder / f"{number:02}.txt").write_text((TEXTS[number % 7] + str(number)) * 3)
    return sorted(folder.iterdir())


@pytest.fixture
def two(cluster: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[object, ...]:
    """The options of two workers."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    return ("--workers", 2, "--ray-address", cluster.address)


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the pieces of work that the driver in this process hands out."""
    names: list[str] = []
    run = ray_pool.RayPool.run

    def noted(pool: Any, task: Any, jobs: Any) -> Any:
        names.extend(name for name in jobs if " " in name)  # no preparation
        return run(pool, task, jobs)

    monkeypatch.setattr(ray_pool.RayPool, "run", noted)
    return names


def killed(command: Sequence[object], done: Callable[[], int]) -> int:
    """Pieces that are done when a driver is killed, after two of them are."""
    driver = subprocess.Popen(
        [sys.executable, "-m", "tappa", *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    while done() < 2 and driver.poll() is None:
        time.sleep(0.02)
    driver.kill()
    _, errors = driver.communicate(timeout=60)
    assert driver.returncode == -9, errors
    return done()


@pytest.mark.same_kernel
def test_an_analysis_that_is_killed(
    run: Run, model: Path, texts: list[Path], two: Any, begun: list[str], tmp_path: Path
) -> None:
    """It goes on from its folder, and ends with the files of one process."""
    out, alone = tmp_path / "out", tmp_path / "alone"
    named = [part for text in texts for part in ("--text", text)]
    command = ["analyze", model, "--device", "cpu", "--shown-texts", 1, *named]

    def kept() -> int:
        return sum(int(path.name[-5:]) for path in (out / "pieces").glob("merged-*")) + len(
            list((out / "pieces").glob("piece-*"))
        )

    count = killed([*command, *two, "--out", out], kept)
    assert 2 <= count < len(texts)
    code, shown, errors = run(*command, *two, "--out", out)
    assert (code, errors) == (0, "")
    assert len(begun) == len(texts) - count  # what was done is not done again
    code, same, _ = run(*command, "--out", alone)
    assert " ".join(shown.replace(str(out), str(alone)).split()) == " ".join(same.split())
    names = sorted(path.name for path in alone.iterdir())
    assert sorted(path.name for path in out.iterdir()) == sorted([*names, "pieces"])
    for name in ("analysis.json", "heads.csv"):
        assert (out / name).read_bytes() == (alone / name).read_bytes()
    (mine,), (theirs,) = (load_views(folder / "views.npz") for folder in (out, alone))
    assert mine.tokens == theirs.tokens
    for name in ("maps", "keys", "weights", "kept", "persistence"):
        np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name))


@pytest.mark.same_kernel
def test_an_evaluation_that_is_killed(
    run: Run, model: Path, two: Any, begun: list[str], tmp_path: Path
) -> None:
    out, alone = tmp_path / "out", tmp_path / "alone"
    sizes = ["--limit", 20, "--lengths", 200, "--budgets", 40, "--methods", "full,snapkv,tappa"]
    command = ["eval", model, "--device", "cpu", "--tasks", "fidelity", *sizes]

    def answered() -> int:
        return len(list((out / "samples").glob("*/*.json")))

    count = killed([*command, *two, "--out", out], answered)
    assert 2 <= count < 20
    code, shown, errors = run(*command, *two, "--out", out)
    assert (code, errors) == (0, "")
    assert f"{20 - count} samples answered, {count} were there already" in shown
    assert len(begun) == 20 - count
    assert run(*command, "--out", alone)[0] == 0
    check_same_grid(out, alone)


def test_a_calibration_by_workers(
    run: Run, model: Path, texts: list[Path], two: Any, begun: list[str], tmp_path: Path
) -> None:
    """Order, scores and head importances; its file serves one process too."""
    cut = ["--text", texts[0], "--held-out", texts[1], "--window", 31, "--stride", 17]
    command = ["prune", model, "--device", "cpu", "--layers", 3, "--dry-run", "--json", *cut]
    sums, alone = tmp_path / "sums.json", tmp_path / "alone.json"
    code, shown, errors = run(*command, *two, "--calibration", sums)
    assert code == 0
    assert "windows in 4 pieces\non 2 workers: at most 2 pieces each\nto read: " in errors
    assert "FLOP" in errors
    assert len(begun) == 4
    assert len(json.loads(shown)["plan"]["layers"]) == 3
    assert run(*command, "--calibration", alone)[1] == shown
    assert sums.read_bytes() == alone.read_bytes()
    assert run(*command, *two, "--calibration", alone)[1] == shown
    assert len(begun) == 4  # nothing is done again


# ---- what cannot be had


def refused(run: Run, *command: object) -> str:
    """The one line of a command that cannot work."""
    code, shown, errors = run(*command)
    assert (code, shown) == (2, "")
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    return errors


@pytest.fixture
def command(model: Path, texts: list[Path], tmp_path: Path) -> Callable[[str], tuple[object, ...]]:
    """Each of the commands."""

    def made(name: str) -> tuple[object, ...]:
        given = {"eval": (), "prune": ("--held-out", texts[0], "--window", 31, "--layers", 1)}
        text = ("--text", texts[0]) if name != "eval" else ()
        out = ("--out", tmp_path / "out")
        return (name, model, "--device", "cpu", *text, *given.get(name, ()), *out)

    return made


@pytest.mark.parametrize("name", COMMANDS)
def test_what_the_options_refuse(
    run: Run, command: Any, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert "'--workers'" in refused(run, *command(name), "--workers", 0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    asked = ("--workers", 2, "--ray-address")
    assert f"no Ray cluster answers at {address}" in refused(run, *command(name), *asked, address)
    assert "HOST:PORT of a cluster, got 'a:b'" in refused(run, *command(name), *asked, "a:b")
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "tappa.cluster.ray_pool")
    assert "pip install 'tappa[cluster]'" in refused(run, *command(name), "--workers", 2)
    assert not (tmp_path / "out" / "pieces").exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_more_than_the_cluster_has(run: Run, two: Any, command: Any, name: str) -> None:
    message = refused(run, *command(name), *two, "--gpus-per-worker", 1)
    assert "expected room for 2 workers with 1 GPU each, there is room for 0" in message


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        (
            "transformers-4.0.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: transformers\nVersion: 4.0.0\n",
            "has transformers 4.0.0 instead of 5.",
        ),
        (
            "tappa.py",
            "raise ModuleNotFoundError('no tappa here')",
            "a worker cannot start: ModuleNotFoundError: no tappa here",
        ),
    ],
    ids=["another version", "none"],
)
def test_workers_with_other_packages(
    run: Run, cluster: Any, command: Any, tmp_path: Path, file: str, content: str, words: str
) -> None:
    """The only node with room finds others first."""
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(content)
    path = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    node = cluster.add_node(num_cpus=6, object_store_memory=STORE, env_vars={"PYTHONPATH": path})
    options = ("--cpus-per-worker", 6, "--ray-address", cluster.address)
    try:
        assert words in refused(run, *command("analyze"), *options)
    finally:
        cluster.remove_node(node)
