"""A grid of an evaluation by many workers: the same answers, each once."""

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pools import Elsewhere
from short_memory import short_of_memory
from tappa.cluster import InProcess, ModelSource
from tappa.cluster.evaluate import evaluate_grid
from tappa.errors import ClusterError, EvaluationError
from tappa.evaluation.evaluate import Evaluation, Source
from tiny import save_tiny

WANTED = Evaluation(
    ("full", "snapkv", "tappa"),
    (40, 0.5),
    ("fidelity", "choice_arithmetic"),
    Source(limit=3, lengths=(200,)),
)
FILES = [f"{task}/{n:05}.json" for task in ("choice_arithmetic", "fidelity") for n in range(3)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelSource]:
    folder = tmp_path_factory.mktemp("grid")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder / "datasets"))
        yield ModelSource(str(save_tiny(folder / "model", num_hidden_layers=1)), device="cpu")


@pytest.fixture(scope="module")
def whole(source: ModelSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By this process alone."""
    folder = tmp_path_factory.mktemp("whole")
    evaluate_grid(InProcess(source), WANTED, folder)
    return folder


def timeless(value: Any) -> Any:
    """The same without times."""
    if isinstance(value, dict):
        return {key: timeless(x) for key, x in value.items() if not key.endswith("_seconds")}
    return [timeless(x) for x in value] if isinstance(value, list) else value


def answers(folder: Path) -> dict[str, Any]:
    """All that is written of samples but times."""
    return {
        f"{path.parent.name}/{path.name}": timeless(json.loads(path.read_text()))
        for path in sorted((folder / "samples").rglob("*.json"))
    }


def check_same(mine: Path, theirs: Path) -> None:
    assert answers(mine) == answers(theirs)
    tables = [timeless(json.loads((one / "results.json").read_text())) for one in (mine, theirs)]
    assert tables[0] == tables[1]
    texts = [(one / "tables.md").read_text().split("Memory and time")[0] for one in (mine, theirs)]
    assert texts[0] == texts[1]


@pytest.mark.same_kernel
def test_workers_answer_as_one_process_does(
    source: ModelSource, whole: Path, tmp_path: Path
) -> None:
    assert list(answers(whole)) == FILES
    pool, seen = Elsewhere(source), list[tuple[int, int]]()
    results = evaluate_grid(pool, WANTED, tmp_path, follow=lambda a, b, *c: seen.append((a, b)))
    check_same(tmp_path, whole)
    assert (results.outcome.answered, results.outcome.found, results.outcome.left) == (6, 0, 0)
    assert results.outcome.prefills > 0
    assert seen == [(n, 6) for n in range(7)]
    assert sorted(pool.done) == sorted(
        f"{task} {n}" for task in ("choice_arithmetic", "fidelity") for n in range(3)
    )
    run = json.loads((tmp_path / "grid.json").read_text())["run"]
    assert (run["workers"], run["batch"]) == (2, 1)


@pytest.mark.same_kernel
def test_an_interrupted_grid_goes_on(source: ModelSource, whole: Path, tmp_path: Path) -> None:
    first = evaluate_grid(Elsewhere(source, stop=2), WANTED, tmp_path)
    assert (first.outcome.answered, first.outcome.left) == (2, 4)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "samples").rglob("*.json")}
    second = Elsewhere(source)
    results = evaluate_grid(second, WANTED, tmp_path)
    assert (results.outcome.answered, results.outcome.found) == (4, 2)
    assert all(p.stat().st_mtime_ns == time for p, time in before.items())
    check_same(tmp_path, whole)
    other = replace(WANTED, source=replace(WANTED.source, seed=1))
    with pytest.raises(EvaluationError, match="another grid: seed is 0 there and 1 now"):
        evaluate_grid(second, other, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        evaluate_grid(Elsewhere(source, stop=0), WANTED, tmp_path / "none")


def test_workers_do_what_is_missing(source: ModelSource, whole: Path, tmp_path: Path) -> None:
    """More samples, methods, budgets and tasks; a damaged file is set aside."""
    fewer = Evaluation(("full", "snapkv"), (40,), ("fidelity",), replace(WANTED.source, limit=2))
    evaluate_grid(Elsewhere(source), fewer, tmp_path)
    (tmp_path / "samples" / "fidelity" / "00001.json").write_text("{")
    said, pool = list[str](), Elsewhere(source)
    results = evaluate_grid(pool, WANTED, tmp_path, batch=3, say=said.append)
    assert len(said) == 1
    assert "00001.json is damaged" in said[0]
    outcome = results.outcome
    assert (outcome.answered, outcome.added, outcome.found) == (6, 1, 0)
    # those that lack the same cells are answered together
    assert set(pool.done) == {"choice_arithmetic 0, 1, 2", "fidelity 0", "fidelity 1, 2"}
    assert sorted(answers(tmp_path)) == FILES
    for name, record in answers(whole).items():
        mine = {(one["method"], one["budget"]): one for one in answers(tmp_path)[name]["answers"]}
        for one in record["answers"]:
            scores = {k: v for k, v in one["scores"].items() if k in ("kl", "nll")}
            found = mine[one["method"], one["budget"]]["scores"]
            assert {k: found[k] for k in scores} == pytest.approx(scores, abs=1e-4)


def test_workers_halve_what_does_not_fit(source: ModelSource, whole: Path, tmp_path: Path) -> None:
    pool, said = Elsewhere(source), list[str]()
    with short_of_memory(pool.inner.worker.model(source).model, rows=2):
        evaluate_grid(pool, WANTED, tmp_path, batch=3, say=said.append)
    assert said == [
        f"out of memory in fidelity with {what} together: going on with {number}"
        for what, number in (("3 samples", 1), ("5 cells", 2))
    ]
    found, wanted = answers(tmp_path), answers(whole)
    assert found.keys() == wanted.keys()
    for name, record in wanted.items():
        keys = [
            [(one["method"], one["budget"]) for one in x["answers"]] for x in (record, found[name])
        ]
        assert keys[0] == keys[1]


@pytest.mark.same_kernel
def test_cells_that_fail_are_named_and_the_tables_written(
    source: ModelSource, whole: Path, tmp_path: Path
) -> None:
    pool = Elsewhere(source, broken=("fidelity 1", "choice_arithmetic 2"))
    with pytest.raises(ClusterError, match=r"2 pieces failed: .*fidelity 1: KeyError"):
        evaluate_grid(pool, WANTED, tmp_path)
    assert sorted(answers(tmp_path)) == [FILES[0], FILES[1], FILES[3], FILES[5]]
    assert "| snapkv |" in (tmp_path / "tables.md").read_text()
    evaluate_grid(Elsewhere(source), WANTED, tmp_path)
    check_same(tmp_path, whole)


def test_batches_are_answered_together(source: ModelSource, tmp_path: Path) -> None:
    pool = Elsewhere(source)
    evaluate_grid(pool, WANTED, tmp_path, batch=2, shard=(0, 2))
    assert sorted(pool.done) == ["fidelity 0, 1", "fidelity 2"]  # the others are of shard (1, 2)


def test_a_worker_that_makes_other_samples(source: ModelSource, tmp_path: Path) -> None:
    """Such as one with another version of Python, from whose manual the samples come."""
    pool = Elsewhere(source)

    def change(done: int, *others: int) -> None:
        if done == 1:
            made = pool.inner.worker.kept["samples"]
            made.pop(next(name for name in made if (name.task, name.number) == ("fidelity", 0)))

    with pytest.raises(EvaluationError, match="another sample 0 of fidelity"):
        evaluate_grid(pool, WANTED, tmp_path, follow=change)


def test_an_interrupt_of_the_process(source: ModelSource, tmp_path: Path) -> None:
    """A real one, between two samples: the second is not begun."""
    sent: list[int] = []

    def interrupt(done: int, *others: int) -> None:
        if done == 1 and not sent:
            sent.append(done)
            os.kill(os.getpid(), signal.SIGINT)

    results = evaluate_grid(InProcess(source), WANTED, tmp_path, follow=interrupt)
    assert results.outcome.left == 5
