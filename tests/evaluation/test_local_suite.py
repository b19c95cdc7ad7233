"""The local long-context suite: what is written, and how lm-eval reads and scores it."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tappa.errors import EvaluationError, OutputError
from tappa.evaluation.local_suite import TASKS, Library, Sample, paragraphs, write_local_suite
from tappa.models import LoadedModel

pytest.importorskip("lm_eval")
# what datasets 5 and lm-eval 0.4.13 do at import and on loading
pytestmark = [
    pytest.mark.xdist_group("smollm2"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore:Using slow pure-python SequenceMatcher"),
    pytest.mark.filterwarnings("ignore:pkg_resources is deprecated"),
]
LENGTHS = (600, 900)
ANYWHERE = {"local_code_completion", "local_passage_count"}  # whose answer is not in the context


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def suite(smollm2: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suite")
    names = write_local_suite(folder, smollm2.tokenizer, per_task=6, lengths=LENGTHS)
    assert names == list(TASKS)
    return folder


@pytest.fixture(scope="module")
def loaded(suite: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The tasks as lm-eval sees them."""
    pytest.importorskip("fuzzywuzzy")
    return load(suite, list(TASKS), tmp_path_factory.mktemp("datasets"))


def load(folder: Path, names: list[str], cache: Path) -> dict[str, Any]:
    import datasets
    from lm_eval.tasks import TaskManager, get_task_dict

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        return get_task_dict(names, manager)


def test_the_same_arguments_give_the_same_bytes_and_more_samples_change_none(
    smollm2: LoadedModel, suite: Path, tmp_path: Path
) -> None:
    write_local_suite(tmp_path, smollm2.tokenizer, per_task=2, lengths=LENGTHS)
    for name in TASKS:
        lines = (suite / f"{name}.jsonl").read_text().splitlines()
        assert (tmp_path / f"{name}.jsonl").read_text().splitlines() == lines[:2]
        settings = (tmp_path / f"{name}.yaml").read_text()
        assert settings.replace(str(tmp_path), str(suite)) == (suite / f"{name}.yaml").read_text()
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".jsonl"] * 8 + [".yaml"] * 8


def test_another_seed_gives_other_samples(
    smollm2: LoadedModel, suite: Path, tmp_path: Path
) -> None:
    write_local_suite(tmp_path, smollm2.tokenizer, per_task=1, lengths=LENGTHS, seed=1)
    for name in TASKS:
        assert rows_of(tmp_path, name)[0]["context"] != rows_of(suite, name)[0]["context"]


@pytest.mark.parametrize("name", TASKS)
def test_samples(smollm2: LoadedModel, suite: Path, loaded: dict[str, Any], name: str) -> None:
    task, rows = loaded[name], rows_of(suite, name)
    assert len(rows) == 6
    assert len({row["_id"] for row in rows}) == len({row["context"] for row in rows}) == 6
    for number, (row, doc) in enumerate(zip(rows, task.test_docs(), strict=True)):
        assert doc == row
        prompt = task.doc_to_text(doc)
        sample = Sample(row["context"], row["input"], row["answers"], row["all_classes"])
        assert prompt == TASKS[name].render(sample)
        limit = LENGTHS[number % 2] - TASKS[name].answer_tokens
        assert row["length"] == len(smollm2.tokenizer(prompt).input_ids)
        assert 0.75 * limit < row["length"] <= limit
        assert row["dataset"] == name
        if name == "local_multi_doc":
            town, thing = row["answers"][0].split(" where they make ")
            assert f" lives in {town}." in row["context"]
            assert f"The people of {town} make {thing}." in row["context"]
            assert row["answers"][0] not in row["context"]
        elif name not in ANYWHERE:
            assert row["answers"][0] in row["context"]


def wrong_answer(row: dict[str, Any]) -> str:
    return "I cannot say." if not row["answers"][0].isdigit() else str(int(row["answers"][0]) + 1)


@pytest.mark.parametrize("name", TASKS)
def test_the_right_answer_scores_one(loaded: dict[str, Any], name: str) -> None:
    task = loaded[name]
    metric = f"{TASKS[name].metric}_score"
    assert set(task.aggregation()) == {"score", metric}
    for doc in task.test_docs():
        right = doc["answers"][0]
        lead = "" if name == "local_code_completion" else " "
        assert task.process_results(doc, [lead + right]) == {"score": 1.0, metric: 1.0}
        assert task.process_results(doc, [wrong_answer(doc)])["score"] < 0.5
        assert task.process_results(doc, [""])["score"] == 0.0
        assert not any(stop in right for stop in task.config.generation_kwargs["until"]) or (
            name == "local_code_completion"
        )


def test_the_number_of_a_fact_is_asked_for_once(suite: Path) -> None:
    for name in ("local_single_doc", "local_number_recall"):
        for row in rows_of(suite, name):
            assert row["context"].count(f"{row['input']} {row['answers'][0]}.") == 1
    for row in rows_of(suite, "local_dialogue_recall"):
        speaker = row["input"].split()[0]
        assert row["context"].count(f"{speaker}: I will take the ") == 1
        assert f"{speaker}: I will take the {row['answers'][0]}." in row["context"]


def test_the_excerpt_is_in_the_paragraph_that_is_the_answer(suite: Path) -> None:
    for row in rows_of(suite, "local_passage_retrieval"):
        parts = row["context"].split("\n\n")
        holders = [part.partition(":")[0] for part in parts if row["input"] in part]
        assert holders == row["answers"]
        assert len(parts) == 8


def test_the_count_is_that_of_different_passages(suite: Path) -> None:
    for row in rows_of(suite, "local_passage_count"):
        passages = row["context"].split("\n\n")
        assert row["answers"] == [str(len(set(passages)))]
        assert len(passages) > len(set(passages))


def test_labels_follow_the_examples(suite: Path) -> None:
    for row in rows_of(suite, "local_few_shot"):
        assert len(row["all_classes"]) == 4
        counts = Counter(
            line.removeprefix("Label: ")
            for line in row["context"].splitlines()
            if line.startswith("Label: ")
        )
        assert set(counts) == set(row["all_classes"])
        assert max(counts.values()) - min(counts.values()) <= 1


def test_the_next_line_follows_the_context_in_a_file(suite: Path) -> None:
    code = Library.open().code
    for row in rows_of(suite, "local_code_completion"):
        assert any(f"{row['context']}{row['answers'][0]}\n" in source for source in code)


def test_texts_of_the_caller_are_used(smollm2: LoadedModel, tmp_path: Path) -> None:
    text = "\n\n".join(
        f"The story of number {n} is a long one, and nobody tells it. It ends as it began."
        for n in range(200)
    )
    write_local_suite(tmp_path, smollm2.tokenizer, per_task=6, lengths=[600], texts=[text])
    contexts = [row["context"] for row in rows_of(tmp_path, "local_single_doc")]
    assert any("The story of number" in context for context in contexts)


def test_paragraphs_are_prose_of_bounded_length() -> None:
    prose = "This is a sentence of prose that is long enough to stay here. So is this one."
    code = "   def f(x):\n       return x"
    long = " ".join(f"Sentence number {n} says hardly anything at all." for n in range(60))
    found = paragraphs(f"HEADING\n\n{prose}\n\n{code}\n\n* a bullet point\n\n{long}")
    assert found[0] == prose
    assert " ".join(found[1:]) == long
    assert all(len(piece) <= 500 for piece in found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_task": 0}, "expected per_task of at least 1, got 0"),
        ({"lengths": []}, "expected at least one length, got none"),
        ({"lengths": [40]}, "40 tokens are too few for a sample of local_single_doc"),
        ({"lengths": [-5]}, "-5 tokens are too few for a sample of local_single_doc"),
        (
            {"texts": ["one two"]},
            "expected paragraphs of 60 characters or more, text 1 has none",
        ),
    ],
)
def test_what_cannot_be_written(
    smollm2: LoadedModel, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(EvaluationError) as error:
        write_local_suite(tmp_path, smollm2.tokenizer, **changes)
    assert str(error.value) == message


def test_a_folder_that_is_a_file(smollm2: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write to the folder"):
        write_local_suite(tmp_path / "file", smollm2.tokenizer, per_task=1)
