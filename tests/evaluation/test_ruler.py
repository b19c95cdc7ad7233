"""RULER, frozen: what lm-eval generates and how lm-eval scores it."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks.ruler import common_utils

from tappa.errors import EvaluationError
from tappa.evaluation import ruler
from tappa.evaluation.ruler import MAX_GEN_TOKS, NIAH, TASKS, write_ruler
from tappa.models import LoadedModel

pytestmark = pytest.mark.xdist_group("smollm2")
LENGTH = 1024
COUNT = 3
Documents = dict[str, list[dict[str, Any]]]


def read(folder: Path) -> Documents:
    return {
        path.stem: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in sorted(folder.glob("*.jsonl"))
    }


def named(name: str, length: int = LENGTH) -> str:
    return f"ruler_{name}_{length}"


@pytest.fixture(scope="module")
def folder(smollm2: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ruler")
    names = write_ruler(folder, smollm2.tokenizer, lengths=[LENGTH], per_task=COUNT)
    assert names == [named(name) for name in TASKS]
    return folder


@pytest.fixture(scope="module")
def tasks(folder: Path) -> dict[str, Task]:
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    assert sorted(manager.all_tags) == ["tappa_ruler"]
    return manager.load([named(name) for name in TASKS])["tasks"]


def prompt_of(task: Task, document: dict[str, Any]) -> str:
    prefix = task.doc_to_prefix(document)
    prompt = task.fewshot_context(document, 0, gen_prefix=prefix)
    assert isinstance(prompt, str)
    return prompt


@pytest.mark.parametrize("name", TASKS)
def test_documents(folder: Path, tasks: dict[str, Task], smollm2: LoadedModel, name: str) -> None:
    task = tasks[named(name)]
    documents = list(task.test_docs())
    assert documents == read(folder)[named(name)]
    assert len(documents) == COUNT
    assert len({document["input"] for document in documents}) == COUNT
    for document in documents:
        prompt = prompt_of(task, document)
        assert prompt.startswith(document["input"])
        assert prompt.endswith(document["gen_prefix"])
        tokens = len(smollm2.tokenizer(prompt).input_ids) + MAX_GEN_TOKS[name]
        assert tokens == document["length"] <= document["max_length"] == LENGTH
        assert all(answer in document["input"] for answer in document["outputs"])
        gold = " " + ", ".join(document["outputs"])
        assert len(smollm2.tokenizer(gold).input_ids) <= MAX_GEN_TOKS[name]


@pytest.mark.parametrize("name", TASKS)
def test_scores_are_those_of_lm_eval(tasks: dict[str, Task], name: str) -> None:
    task = tasks[named(name)]
    document = next(iter(task.test_docs()))
    gold = document["outputs"]
    right = "They are: " + ", ".join(gold).upper()
    for response, score in ((right, 1.0), ("none of them", 0.0), (gold[0], 1 / len(gold))):
        assert task.process_results(document, [response]) == {"score": pytest.approx(score)}
        theirs = common_utils.process_results(document, [response])
        assert theirs[str(LENGTH)] == pytest.approx(score)
    assert task.higher_is_better() == {"score": True}


def test_some_of_several_values_score_in_part(tasks: dict[str, Task]) -> None:
    for name in ("niah_multivalue", "niah_multiquery"):
        task = tasks[named(name)]
        document = next(iter(task.test_docs()))
        assert len(document["outputs"]) == 4
        three = " ".join(document["outputs"][1:])
        assert task.process_results(document, [three]) == {"score": 0.75}


def test_prompts_are_greedily_answered(tasks: dict[str, Task]) -> None:
    for name in TASKS:
        wanted = tasks[named(name)].config.generation_kwargs
        assert wanted == {
            "do_sample": False,
            "temperature": 0.0,
            "max_gen_toks": MAX_GEN_TOKS[name],
            "until": [],
        }


def test_one_task_does_not_change_another(
    folder: Path, smollm2: LoadedModel, tmp_path: Path
) -> None:
    few = ["cwe", "ruler_vt", "niah_multikey_1"]
    random.seed(77)
    names = write_ruler(tmp_path, smollm2.tokenizer, tasks=few, lengths=[LENGTH], per_task=COUNT)
    assert names == [named("cwe"), named("vt"), named("niah_multikey_1")]
    for name in names:
        new, old = (where / f"{name}.jsonl" for where in (tmp_path, folder))
        assert new.read_bytes() == old.read_bytes()


@pytest.mark.usefixtures("as_users_run_it")  # the type checks of the tests draw random numbers
def test_random_states_are_as_before(smollm2: LoadedModel, tmp_path: Path) -> None:
    def state() -> tuple[object, ...]:
        return (
            random.getstate(),
            repr(np.random.get_state(legacy=False)),
            np.random.random(3).tolist(),
        )

    random.seed(1)
    np.random.seed(2)
    before = state()
    np.random.seed(2)
    write_ruler(
        tmp_path,
        smollm2.tokenizer,
        tasks=["vt", "cwe", "niah_single_2"],
        lengths=[LENGTH],
        per_task=1,
    )
    assert state() == before


def test_seed_length_and_count(smollm2: LoadedModel, folder: Path, tmp_path: Path) -> None:
    names = write_ruler(
        tmp_path, smollm2.tokenizer, tasks=["vt"], lengths=[1024, 2048], per_task=2, seed=1
    )
    assert names == [named("vt"), named("vt", 2048)]
    documents = read(tmp_path)
    assert [len(documents[name]) for name in names] == [2, 2]
    assert 1024 < documents[names[1]][0]["length"] <= 2048
    assert documents[names[0]][0]["input"] != read(folder)[names[0]][0]["input"]


def test_own_essays(smollm2: LoadedModel, tmp_path: Path) -> None:
    essays = tmp_path / "essays"
    essays.mkdir()
    for name, first in (("b", "Second"), ("a", "First")):
        sentences = [f"{first} sentence number {i} of an essay." for i in range(200)]
        (essays / f"{name}.txt").write_text("\n".join(sentences))
    write_ruler(
        tmp_path,
        smollm2.tokenizer,
        tasks=["niah_single_2"],
        lengths=[LENGTH],
        per_task=2,
        essays=essays,
    )
    for document in read(tmp_path)[named("niah_single_2")]:
        lines = document["input"].split("\n")
        needle = f"is: {document['outputs'][0]}."
        assert lines[1].replace("One of", "|").count("|") == 1
        assert needle in lines[1]
        before, after = lines[1].split("One of")[0], lines[1].split(needle)[1]
        assert before == " " or before.endswith("of an essay. ")  # between sentences
        assert (before + after).strip().startswith("First sentence number 0 of an essay.")


def test_too_few_essays(smollm2: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One sentence, and no more. " * 80)
    with pytest.raises(EvaluationError, match="text for 1024 tokens, the essays have only 401 wo"):
        write_ruler(
            tmp_path,
            smollm2.tokenizer,
            tasks=["niah_multikey_1"],
            lengths=[LENGTH],
            per_task=1,
            essays=tmp_path,
        )


def test_the_kinds_are_those_of_lm_eval(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    from lm_eval.tasks.ruler import niah_utils  # slow, but loaded to write the folder

    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(niah_utils, "get_tokenizer", lambda *_: None)
    monkeypatch.setattr(niah_utils, "get_haystack", lambda type_haystack: type_haystack)
    monkeypatch.setattr(niah_utils, "generate_samples", lambda *_, **kind: calls.append(kind))
    monkeypatch.setattr(niah_utils, "download_dataset", list)
    for name, kind in NIAH.items():
        getattr(niah_utils, name)(max_seq_lengths=[LENGTH])
        others = {"max_seq_length": LENGTH, "num_samples": 500, "TOKENIZER": None}
        assert calls[-1] == {**kind, **others, "template": niah_utils.TEMPLATE}


def test_errors(smollm2: LoadedModel, tmp_path: Path) -> None:
    tokenizer = smollm2.tokenizer
    with pytest.raises(
        EvaluationError, match=r"got 'niah_singel_2'; the nearest are niah_single_2"
    ):
        write_ruler(tmp_path, tokenizer, tasks=["niah_singel_2"])
    with pytest.raises(EvaluationError, match="at least 1024 tokens for RULER, got 1000"):
        write_ruler(tmp_path, tokenizer, lengths=[4096, 1000])
    with pytest.raises(EvaluationError, match="at least 1 sample"):
        write_ruler(tmp_path, tokenizer, per_task=0)
    for essays in (tmp_path, tmp_path / "missing"):
        with pytest.raises(EvaluationError, match=r"\*\.txt files of essays, got .*"):
            write_ruler(tmp_path, tokenizer, essays=essays)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["niah_multivalue", "vt", "cwe"])
def test_a_length_that_holds_no_document(
    smollm2: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    class Letters:
        """A tokenizer with a token for each letter."""

        def __init__(self, text: str) -> None:
            self.input_ids = list(text)

    monkeypatch.setattr(ruler, "MIN_LENGTH", 600)
    monkeypatch.setattr(type(smollm2.tokenizer), "__call__", lambda _, text, **__: Letters(text))
    with pytest.raises(EvaluationError, match=f"600 tokens are too few for ruler_{name}"):
        write_ruler(tmp_path, smollm2.tokenizer, tasks=[name], lengths=[600], per_task=1)


@pytest.mark.parametrize("name", ["niah_single_2", "niah_multikey_3", "vt", "cwe", "fwe"])
def test_more_documents_change_no_earlier_ones(
    folder: Path, smollm2: LoadedModel, tmp_path: Path, name: str
) -> None:
    """Also where some of the later ones are too long at first."""
    write_ruler(tmp_path, smollm2.tokenizer, tasks=[name], lengths=[LENGTH], per_task=3 * COUNT)
    more = read(tmp_path)[named(name)]
    assert len(more) == 3 * COUNT
    assert more[:COUNT] == read(folder)[named(name)]
    assert all(document["length"] <= LENGTH for document in more)
