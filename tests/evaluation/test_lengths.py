"""Prompts that the model's context would cut are refused; large texts are not read as a whole."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import decoders

from tappa.errors import EvaluationError
from tappa.evaluation import fidelity
from tappa.evaluation.fidelity import windows, windows_of_text
from tappa.evaluation.samples import TaskSample
from tappa.evaluation.shared_prefill import GridLM
from tappa.evaluation.suites import Source, count_samples, lengths_of, samples_of
from tappa.texts import packaged_text
from tiny import tiny_model, tiny_tokenizer

CONTEXT = 1500
SYSTEM = "Be brief. " * 30
TEMPLATE = (
    SYSTEM + "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}<s>assistant: "
)


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


@pytest.fixture(scope="module")
def lm() -> GridLM:
    model = tiny_model("llama", num_hidden_layers=1, max_position_embeddings=CONTEXT)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()  # nothing between the characters
    return GridLM(model, tokenizer)


@pytest.mark.parametrize(
    ("name", "lengths"),
    [
        ("fidelity", (300, 700)),
        ("fidelity_4096", (4096,)),
        ("ruler", (300, 700)),
        ("ruler_vt_4096", (4096,)),
        ("ruler_niah_single_1", (300, 700)),
        ("ruler_niah_single_1_2048", (2048,)),
        ("local_number_recall", (300, 700)),
        ("longbench_qasper", ()),
        ("choice", ()),
        ("arc_easy", ()),
    ],
)
def test_lengths_are_in_names_or_options(name: str, lengths: tuple[int, ...]) -> None:
    assert lengths_of(name, Source(lengths=(300, 700))) == lengths


def test_samples_are_counted_by_length() -> None:
    source = Source(limit=5, lengths=(1024, 2048))
    found = [count_samples(name, source) for name in ("fidelity", "fidelity_99", "ruler_vt_4096")]
    assert found == [10, 5, 5]
    assert count_samples("ruler_4096", source) == count_samples("ruler", source) / 2 == 55


@pytest.mark.parametrize(
    "name", ["ruler_vt_4096", "fidelity_4096", "ruler_4096", "perplexity_1501"]
)
def test_a_length_in_a_name_is_held_to_the_context(lm: GridLM, tmp_path: Path, name: str) -> None:
    with pytest.raises(EvaluationError, match=f"{name}: .* than the model's context of 1500"):
        samples_of([name], lm, Source(1, (700,)), tmp_path / "tasks")
    assert not list(tmp_path.rglob("*"))


def test_a_length_in_a_name_overrules_the_option(lm: GridLM, tmp_path: Path) -> None:
    (sample,) = samples_of(["fidelity_144"], lm, Source(1, (4096,)), tmp_path)
    assert (sample.task, sample.number) == ("fidelity_144", 0)
    with pytest.raises(EvaluationError, match="unknown task 'fidelity_x'"):
        samples_of(["fidelity_x"], lm, Source(1, (144,)), tmp_path)


@pytest.mark.parametrize("name", ["local_number_recall", "choice_arithmetic"])
def test_a_prompt_that_would_be_cut_is_refused(lm: GridLM, tmp_path: Path, name: str) -> None:
    """At the very token: the longest that fits, with its answer, is taken."""
    source = Source(1, (1400,))
    (sample,) = samples_of([name], lm, source, tmp_path / "tasks")
    assert isinstance(sample, TaskSample)
    asked = [instance.args for instance in sample.instances]
    if name == "local_number_recall":
        fitting = len(lm.tok_encode(asked[0][0])) + 12
    else:
        fitting = max(len(lm.tok_encode(a + b)) for a, b in asked) - 1  # the last is not read
    for context in (fitting, fitting - 1):
        small = GridLM(lm.model, lm.tokenizer, max_length=context)
        if context == fitting:
            sample.check_length(small)
            continue
        with pytest.raises(EvaluationError, match=r"sample 0 of .* more than the model's context"):
            sample.check_length(small)


def test_a_chat_template_counts(lm: GridLM, tmp_path: Path) -> None:
    """Prompts as long as the context, to which the template adds; LongBench's lose more then."""
    with pytest.raises(EvaluationError, match=r"1[0-9]{3} tokens with its answer.*shorter lengths"):
        samples_of(["local_number_recall"], lm, Source(1, (CONTEXT,), chat=True), tmp_path / "a")
    line = {"input": "Who?", "context": packaged_text()[:4000], "answers": ["he"]}
    (tmp_path / "qasper.jsonl").write_text(json.dumps(line | {"all_classes": None}))
    source = Source(1, data=tmp_path)
    for number, chat in enumerate((False, True)):
        (sample,) = samples_of(
            ["longbench_qasper"], lm, replace(source, chat=chat), tmp_path / f"b{number}"
        )
        assert isinstance(sample, TaskSample)
        tokens = len(lm.tok_encode(sample.instances[0].args[0])) + 128
        assert CONTEXT - 40 < tokens <= CONTEXT


def test_a_large_text_is_not_tokenized_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, encoded = tiny_tokenizer(), list[str]()

    def encode(text: str) -> list[int]:
        encoded.append(text)
        return list(tokenizer(text).input_ids)

    text = "".join(f"{number} is a number. " for number in range(2000))
    whole = windows_of_text(text, encode, 31, 4, seed=3)
    assert whole == windows(encode(text), 31, 4, seed=3)
    monkeypatch.setattr(fidelity, "LARGE", 10_000)
    encoded.clear()
    found = windows_of_text(text, encode, 31, 4, seed=3)
    assert sum(map(len, encoded)) < 4 * 1000
    assert found == windows_of_text(text, encode, 31, 7, seed=3)[:4]
    assert found != windows_of_text(text, encode, 31, 4, seed=4)
    ids = "".join(map(chr, encode(text)))
    places = [ids.index("".join(map(chr, window))) for window in found]
    assert [len(window) for window in found] == [31] * 4
    middle = len(ids) // 2
    assert all((place + 31 <= middle) == (number % 2 == 0) for number, place in enumerate(places))
    with pytest.raises(EvaluationError, match="in half of the text"):
        windows_of_text(text, encode, len(text), 1)
