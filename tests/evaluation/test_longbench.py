"""LongBench from a folder of official files, made up here."""

import json
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from tappa.errors import EvaluationError
from tappa.evaluation.longbench import TASKS, truncate_middle, write_longbench
from tappa.models import LoadedModel
from tappa.texts import packaged_text

pytestmark = [
    pytest.mark.xdist_group("smollm2"),
    pytest.mark.filterwarnings("ignore:Using slow pure-python:UserWarning"),  # fuzzywuzzy
]
CONTEXT = 1024
GOLD = {
    "trec": "Number of something",
    "lsht": "体育",
    "passage_count": "7",
    "passage_retrieval_en": "Paragraph 4",
    "passage_retrieval_zh": "段落4",
    "lcc": "    return left + right",
    "repobench-p": "    return left + right",
}
CLASSES = {"trec": ["Number of something", "Food"], "lsht": ["体育", "农业"]}


def record(name: str, context: str = "", **others: Any) -> dict[str, Any]:
    gold = GOLD.get(name, "会议在上海举行" if name in CHINESE else "Mr Bennet bought a horse")
    return {
        "input": f"The question of {name}?",
        "context": context or packaged_text()[:300],
        "answers": ["no such thing here", gold] if name in ("qasper", "hotpotqa") else [gold],
        "length": 50,
        "dataset": name,
        "language": "zh" if name in CHINESE else "en",
        "all_classes": CLASSES.get(name),
        "_id": "0123",
        **others,
    }


CHINESE = ("multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh")


def write_data(folder: Path, **records: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, lines in records.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


def load(folder: Path, names: list[str]) -> dict[str, Task]:
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return manager.load(names)["tasks"]


def only(task: Task) -> dict[str, Any]:
    (document,) = task.test_docs()
    return document


@pytest.fixture(scope="module")
def tasks(smollm2: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Task]:
    """All 21, from one line each."""
    data = write_data(tmp_path_factory.mktemp("data"), **{name: [record(name)] for name in TASKS})
    folder = tmp_path_factory.mktemp("longbench")
    names = write_longbench(folder, data, smollm2.tokenizer, context=CONTEXT)
    assert names == [f"longbench_{name}" for name in TASKS]
    assert len(names) == 21
    return load(folder, names)


@pytest.mark.parametrize("name", TASKS)
def test_the_gold_answer_gets_the_top_score(tasks: dict[str, Task], name: str) -> None:
    task = tasks[f"longbench_{name}"]
    document = only(task)
    gold = document["answers"][-1]
    metrics = task.process_results(document, [gold])
    assert set(metrics) == set(task.aggregation()) == set(task.higher_is_better())
    assert list(metrics.values()) == pytest.approx([1.0, 1.0])
    wrong = task.process_results(document, ["zzz"])
    assert wrong["score"] < 0.2


@pytest.mark.parametrize("name", TASKS)
def test_a_short_prompt_is_the_template(tasks: dict[str, Task], name: str) -> None:
    """Built once more here, from lm-eval's file."""
    task = tasks[f"longbench_{name}"]
    document, source = only(task), record(name)
    import lm_eval.tasks

    path = Path(lm_eval.tasks.__file__).parent / "longbench" / f"{name}.yaml"
    theirs = load_yaml(path, resolve_func=False)
    expected = theirs["doc_to_text"].replace("{{context}}", source["context"])
    expected = expected.replace("{{question}}", source["input"])
    assert task.fewshot_context(document, 0) == expected
    assert task.config.generation_kwargs == theirs["generation_kwargs"]
    assert document["question"] == source["input"]


def test_long_prompts_lose_the_middle(smollm2: LoadedModel, tmp_path: Path) -> None:
    novel = packaged_text()[:6000]
    chinese = "会议记录：今天讨论了北京的天气。" * 120
    data = write_data(
        tmp_path / "data",
        qasper=[record("qasper", novel), record("qasper")],
        dureader=[record("dureader", chinese)],
    )
    names = write_longbench(
        tmp_path, data, smollm2.tokenizer, tasks=["qasper", "longbench_dureader"], context=700
    )
    english, asian = load(tmp_path, names).values()
    long, short = (english.fewshot_context(doc, 0) for doc in english.test_docs())
    assert packaged_text()[:300] in short
    assert long.startswith("You are given a scientific article")
    assert long.endswith("Question: The question of qasper?\n\nAnswer:")
    assert novel[:200] in long
    assert novel[-200:] in long
    assert novel[2900:3100] not in long
    for task, prompt in ((english, long), (asian, asian.fewshot_context(only(asian), 0))):
        limit = 700 - task.config.generation_kwargs["max_gen_toks"]
        assert limit - 8 <= len(smollm2.tokenizer(prompt).input_ids) <= limit
    assert prompt.startswith("请基于给定的文章")
    assert prompt.endswith("问题：The question of dureader?\n回答：")


@pytest.mark.parametrize("limit", [2, 3, 50, 51])
def test_truncation(smollm2: LoadedModel, limit: int) -> None:
    """The two halves of LongBench's pred.py."""
    tokenizer = smollm2.tokenizer
    text = packaged_text()[1000:2000]
    ids = tokenizer(text).input_ids
    half = limit // 2
    cut = truncate_middle(text, tokenizer, limit)
    assert cut == "".join(str(tokenizer.decode(part)) for part in (ids[:half], ids[-half:]))
    assert len(tokenizer(cut).input_ids) <= limit
    assert truncate_middle(text, tokenizer, len(ids)) == text
    for tail in range(40):  # wherever it cuts a character in two
        asian = "今天讨论了北京的天气𠮷🎉" * 9 + "x" * tail
        assert len(tokenizer(truncate_middle(asian, tokenizer, limit)).input_ids) <= limit


def test_without_data_the_hub_is_named(smollm2: LoadedModel, tmp_path: Path) -> None:
    names = write_longbench(tmp_path, None, smollm2.tokenizer, context=CONTEXT)
    assert len(names) == 21
    assert len(list(tmp_path.iterdir())) == 21
    for name in TASKS:
        task = load_yaml(tmp_path / f"longbench_{name}.yaml", resolve_func=False)
        assert task["task"] == f"longbench_{name}"
        assert task["dataset_path"] == "Xnhyacinth/LongBench"
        assert task["dataset_name"] == name
    index = TaskManager(include_path=str(tmp_path), include_defaults=False)
    assert index.all_subtasks == sorted(names)


def test_missing_files(smollm2: LoadedModel, tmp_path: Path) -> None:
    def write(data: Path, name: str = "hotpotqa", context: int = CONTEXT) -> None:
        write_longbench(tmp_path / "o", data, smollm2.tokenizer, tasks=[name], context=context)

    with pytest.raises(
        EvaluationError, match=r"a folder with LongBench's JSONL files, got .*/gone"
    ):
        write(tmp_path / "gone")
    with pytest.raises(EvaluationError, match=r"expected hotpotqa.jsonl in .*, which has no"):
        write(tmp_path)
    data = write_data(tmp_path / "data", hotpotqa_e=[record("hotpotqa")], lcc=[record("lcc")])
    with pytest.raises(EvaluationError, match=r"which has hotpotqa_e.jsonl, lcc.jsonl"):
        write(data)
    with pytest.raises(EvaluationError, match=r"such as hotpotqa, .*, got 'hotpot'"):
        write(data, "hotpot")
    with pytest.raises(EvaluationError, match="more than the 64 tokens that longbench_lcc gener"):
        write(data, "lcc", 65)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{", r"expected JSON in .*trec.jsonl, line 3: .* at column 2$"),
        ("[1]", r"expected a JSON object in .*trec.jsonl, line 3, got \[1\]"),
        *[
            (
                json.dumps({k: v for k, v in record("trec").items() if k != field}),
                f"expected the field '{field}' in .*trec.jsonl, line 3",
            )
            for field in ("input", "context", "answers", "all_classes")
        ],
        (json.dumps(record("trec", all_classes=None)), "a list of strings as .*'all_classes' in"),
        (json.dumps(record("trec", answers=[])), "a list of strings as the field 'answers' in"),
        (json.dumps(record("trec", input=7)), "a string as the field 'input' in"),
    ],
)
def test_bad_lines(smollm2: LoadedModel, tmp_path: Path, line: str, what: str) -> None:
    data = write_data(tmp_path / "data", trec=[record("trec")])
    path = data / "trec.jsonl"
    path.write_text(path.read_text() + "\n" + line + "\n")  # an empty line is none
    with pytest.raises(EvaluationError, match=what) as error:
        write_longbench(tmp_path, data, smollm2.tokenizer, tasks=["trec"], context=CONTEXT)
    assert "\n" not in str(error.value)


def test_an_empty_file(smollm2: LoadedModel, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", lcc=[])
    with pytest.raises(EvaluationError, match=r"empty file: .*lcc.jsonl"):
        write_longbench(tmp_path, data, smollm2.tokenizer, tasks=["lcc"], context=CONTEXT)


def test_only_what_is_asked_for_is_read(smollm2: LoadedModel, tmp_path: Path) -> None:
    """What follows may be anything: it is not looked at."""
    data = write_data(tmp_path / "data", qasper=[record("qasper", f"Text {n}.") for n in range(3)])
    whole = (data / "qasper.jsonl").read_bytes()
    for rest in (b"{not JSON\n", b"\xff\xfe\n", b'{"context": 1}\n'):
        (data / "qasper.jsonl").write_bytes(whole + rest)
        options: Any = {"tasks": ["qasper"], "context": CONTEXT}
        write_longbench(tmp_path, data, smollm2.tokenizer, limit=3, **options)
        lines = (tmp_path / "longbench_qasper.jsonl").read_text().splitlines()
        assert [f"Text {n}." in line for n, line in enumerate(lines)] == [True] * 3
        with pytest.raises(EvaluationError, match=r"qasper\.jsonl"):
            write_longbench(tmp_path, data, smollm2.tokenizer, limit=4, **options)
    few = write_longbench(tmp_path, data, smollm2.tokenizer, limit=1, **options)
    assert len(list(load(tmp_path, few)["longbench_qasper"].test_docs())) == 1
