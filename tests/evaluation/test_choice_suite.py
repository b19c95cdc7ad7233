"""The multiple-choice suite: what is written, and how lm-eval reads and scores it."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tappa.errors import EvaluationError, OutputError
from tappa.evaluation.choice_suite import ANTONYMS, CATEGORIES, TASKS, write_choice_suite

pytest.importorskip("lm_eval")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suite")
    assert write_choice_suite(folder, per_task=120) == list(TASKS)
    return folder


def test_the_same_seed_gives_the_same_bytes_and_more_samples_change_none(
    suite: Path, tmp_path: Path
) -> None:
    write_choice_suite(tmp_path, per_task=7)
    for name in TASKS:
        lines = (suite / f"{name}.jsonl").read_text().splitlines()
        assert (tmp_path / f"{name}.jsonl").read_text().splitlines() == lines[:7]
    write_choice_suite(tmp_path, per_task=7, seed=1)
    for name in TASKS:
        assert rows_of(tmp_path, name) != rows_of(suite, name)[:7]


@pytest.mark.parametrize("name", TASKS)
def test_choices(suite: Path, name: str) -> None:
    rows = rows_of(suite, name)
    count = 2 if name == "choice_agreement" else 4
    for row in rows:
        assert len(set(row["choices"])) == count
        assert row["query"] == row["query"].strip()
    places = Counter(row["gold"] for row in rows)
    assert set(places) == set(range(count))
    assert min(places.values()) > 0.6 * 120 / count
    assert len({(row["query"], *sorted(row["choices"])) for row in rows}) > 100


def test_sums_are_right(suite: Path) -> None:
    for row in rows_of(suite, "choice_arithmetic"):
        *shown, asked = row["query"].split("\n")
        assert all(eval(line.replace("=", "==")) for line in shown)
        assert str(eval(asked.rstrip("= "))) == row["choices"][row["gold"]]


def test_no_word_has_two_right_answers() -> None:
    words = [word for kind in CATEGORIES.values() for word in kind.split()]
    assert len(set(words)) == len(words)
    assert not set(words) & set(CATEGORIES)
    assert all(len(pair) == 2 for pair in ANTONYMS)
    assert len(set(ANTONYMS)) == len(ANTONYMS)


def test_the_verb_agrees(suite: Path) -> None:
    for row in rows_of(suite, "choice_agreement"):
        noun, attractor = row["query"].split()[1], row["query"].split()[-1]
        verb = row["choices"][row["gold"]].split()[0]
        assert noun.endswith("s") != attractor.endswith("s")
        assert noun.endswith("s") == (verb in {"are", "were", "have", "seem", "look", "do"})


def test_lm_eval_loads_and_scores_them(suite: Path, tmp_path: Path) -> None:
    import datasets
    from lm_eval.tasks import TaskManager, get_task_dict

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
        manager = TaskManager(include_path=str(suite), include_defaults=False)
        tasks = get_task_dict(list(TASKS), manager)
    for name, row in ((name, rows_of(suite, name)[0]) for name in TASKS):
        task = tasks[name]
        doc = next(iter(task.test_docs()))
        assert doc == row
        assert task.doc_to_text(doc) == row["query"]
        assert task.doc_to_choice(doc) == row["choices"]
        assert task.doc_to_target(doc) == row["gold"]
        likely = [(-1.0 if n == row["gold"] else -500.0, False) for n in range(len(row["choices"]))]
        assert task.process_results(doc, likely) == {"acc": 1.0, "acc_norm": 1.0}
        unlikely = [(-501.0 - value, False) for value, _ in likely]
        assert task.process_results(doc, unlikely) == {"acc": 0.0, "acc_norm": 0.0}


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"^expected per_task of at least 1, got -1$"):
        write_choice_suite(tmp_path, per_task=-1)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write to the folder"):
        write_choice_suite(tmp_path / "file", per_task=1)
