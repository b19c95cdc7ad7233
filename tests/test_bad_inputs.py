"""What public functions are given by mistake: an error of tappa, in one line, that names both."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BatchEncoding

import tappa
from tappa.checkpoint import LoadedModel
from tappa.errors import TappaError
from tiny import tiny_model as make_tiny
from tiny import tiny_tokenizer

tiny_model: Any = make_tiny
pytestmark = pytest.mark.usefixtures("as_users_run_it")
load: Any = tappa.load
prune_model: Any = tappa.prune
TEXT = "It is a truth universally acknowledged"  # 38 tokens
IDS = torch.arange(3, 34)[None]  # 31 tokens, of a vocabulary of 101


@pytest.fixture(scope="module")
def x() -> SimpleNamespace:
    """A model and what can be made of it."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    return SimpleNamespace(
        model=model,
        tokenizer=tokenizer,
        loaded=LoadedModel(model, tokenizer),
        analysis=tappa.analyze(model, tokenizer, TEXT),
        calibration=tappa.calibrate(model, tokenizer, TEXT, window=17, stride=17),
        recording=tappa.record(model, IDS),
        context=tappa.compress_context(model, IDS, "streaming_llm", 5, window=3, sinks=2),
        cache=lambda: tappa.compressed(model, "full"),
    )


def analyze(x: Any, texts: Any = TEXT, **changes: Any) -> Any:
    arguments = {"model": x.model, "tokenizer": x.tokenizer, "texts": texts} | changes
    return tappa.analyze(**arguments)


def compressed(x: Any, **changes: Any) -> Any:
    return tappa.compressed(**{"model": x.model, "method": "cake", "budget": 64} | changes)


def context(x: Any, **changes: Any) -> Any:
    return tappa.compress_context(
        **{"model": x.model, "input_ids": IDS, "method": "full", "budget": None} | changes
    )


def generate(x: Any, **changes: Any) -> Any:
    return tappa.generate(**{"cache": x.cache(), "input_ids": IDS, "max_new_tokens": 3} | changes)


def calibrate(x: Any, **changes: Any) -> Any:
    return tappa.calibrate(
        **{"model": x.model, "tokenizer": x.tokenizer, "texts": TEXT, "window": 17} | changes
    )


def prune(x: Any, known: Any = None, **amounts: Any) -> Any:
    return tappa.prune(x.model, x.calibration if known is None else known, **amounts)


Call = Callable[[Any], Any]
BUDGET = "tokens (an int) or a share of the prompt (a float up to 1.0)"
CASES: list[tuple[Call, str, str]] = [  # the call, what was expected, what came
    # models
    (lambda x: analyze(x, model="my/model"), "model of transformers", "got 'my/model': load it"),
    (lambda x: analyze(x, model=Path("m.gguf")), "model of transformers", "load it first"),
    (lambda x: analyze(x, model=None), "model of transformers", "got None"),
    (lambda x: analyze(x, model=x.loaded), "model of transformers", "got a LoadedModel"),
    (lambda x: analyze(x, model=nn.Linear(2, 3)), "model of transformers", "got Linear("),
    (lambda x: calibrate(x, model=x.tokenizer), "model of transformers", "got a tokenizer"),
    (lambda x: compressed(x, model="m"), "model of transformers", "got 'm'"),
    (lambda x: context(x, model=7), "model of transformers", "got 7"),
    (lambda x: tappa.record(x.loaded, IDS), "model of transformers", "got a LoadedModel"),
    (lambda x: prune_model("m", x.calibration, layers=1), "model of transformers", "got 'm'"),
    (lambda x: load(x.model), "model folder or a hub id", "got a LlamaForCausalLM"),
    (lambda x: load(7), "model folder or a hub id", "got 7"),
    (lambda x: load("m.gguf", dtype=[]), "the dtype auto, float32", "got '[]'"),
    (lambda x: load("m.gguf", dtype="flaot32"), "the dtype auto", "did you mean 'float32'?"),
    (lambda x: load("m.gguf", device="gpu"), "the device auto", "got 'gpu'"),
    # tokenizers
    (lambda x: analyze(x, tokenizer=None), "a tokenizer of transformers", "got None"),
    (lambda x: analyze(x, tokenizer="my/model"), "a tokenizer of transformers", "got 'my/model'"),
    (lambda x: calibrate(x, tokenizer=x.model), "a tokenizer", "got a LlamaForCausalLM"),
    # texts
    (lambda x: analyze(x, None), "a text as str or Path", "got None"),
    (lambda x: analyze(x, 7), "a text as str or Path", "got 7"),
    (lambda x: analyze(x, TEXT.encode()), "a text as str or Path", "got b'It is"),
    (lambda x: analyze(x, [TEXT, None]), "a text as str or Path", "got None"),
    (lambda x: analyze(x, [3, 4, 5]), "a text as str or Path", "got 3: its text is wanted"),
    (lambda x: analyze(x, IDS), "a text as str or Path", "its text is wanted"),
    (
        lambda x: analyze(x, BatchEncoding({"input_ids": IDS})),
        "a text as str or Path",
        "got a BatchE",
    ),
    (lambda x: analyze(x, []), "at least one text", "got none"),
    (lambda x: analyze(x, Path("nowhere.txt")), "cannot read the text file", "nowhere.txt"),
    (lambda x: calibrate(x, texts=IDS), "a text as str or Path", "its text is wanted"),
    # numbers and settings of analyses
    (lambda x: analyze(x, tokens="8"), "tokens as a whole number from 8 on", "got '8'"),
    (lambda x: analyze(x, tokens=16.5), "tokens as a whole number", "got 16.5"),
    (lambda x: analyze(x, tokens=float("nan")), "tokens as a whole number", "got nan"),
    (lambda x: analyze(x, tokens=True), "tokens as a whole number", "got True"),
    (lambda x: analyze(x, chunk=0), "chunk as a whole number from 1 on", "got 0"),
    (lambda x: analyze(x, chunk="7"), "chunk as a whole number", "got '7'"),
    (lambda x: analyze(x, settings={"lags": 8}), "settings as tappa.Settings", "got {'lags': 8}"),
    (lambda x: analyze(x, progress=7), "progress as a function", "got 7"),
    (lambda x: tappa.Settings(window="7"), "window of at least 2", "got '7'"),  # type: ignore[arg-type]
    (lambda x: x.analysis.merge(x.calibration), "an Analysis to merge", "got a Calibration"),
    (lambda x: x.analysis.save(None), "the path of a file", "got None"),
    (lambda x: tappa.Analysis.load(x.analysis), "the path of a file", "got an Analysis"),
    # budgets
    *(
        (lambda x, b=budget: compressed(x, budget=b), BUDGET, f"got {came}")
        for budget, came in [
            *((None, "None"), (True, "True"), ("64", "the string '64'"), ("0.5", "the string")),
            *((0, "0"), (-3, "-3"), (float("nan"), "nan"), (1.5, "1.5"), ([64], "[64]")),
            (torch.tensor([64, 32]), "tensor([64, 32])"),
        ]
    ),
    # methods and their options
    (lambda x: compressed(x, method=None), "a method as its name", "got None"),
    (lambda x: compressed(x, method=["cake"]), "a method as its name", "got ['cake']"),
    (lambda x: compressed(x, method="snapvk"), "a method of full", "did you mean 'snapkv'?"),
    (lambda x: compressed(x, gama=3), "cake takes gamma", "'gama'; did you mean 'gamma'?"),
    (lambda x: compressed(x, gamma="3"), "gamma as float", "got '3'"),
    (lambda x: compressed(x, every="16"), "every as a whole number", "got '16'"),
    (lambda x: compressed(x, every=1.5), "every as a whole number", "got 1.5"),
    (lambda x: compressed(x, analysis=7), "an Analysis or the path of one", "got 7"),
    (lambda x: x.recording.compress("cake", 64), "a list of budgets", "got 64"),
    (lambda x: x.recording.compress("cake", "64"), "a list of budgets", "got '64'"),
    # token ids
    *(
        (lambda x, f=function, i=ids: f(x, i), wanted, came)
        for function in (
            lambda x, ids: context(x, input_ids=ids),
            lambda x, ids: tappa.record(x.model, ids),
            lambda x, ids: generate(x, input_ids=ids),
        )
        for ids, wanted, came in [
            (TEXT, "token ids as a tensor", 'tokenizer(text, return_tensors="pt").input_ids'),
            (None, "token ids as a tensor", "got None"),
            (BatchEncoding({"input_ids": IDS}), "token ids", "got a BatchEncoding: its .input_ids"),
            (IDS.tolist(), "token ids as a tensor", "got a list: torch.tensor([ids])"),
            (np.arange(3, 9)[None], "token ids as a tensor", "got array([[3"),
            (IDS[0], "shape (rows, tokens)", "shape (31,): ids[None]"),
            (IDS[None], "shape (rows, tokens)", "shape (1, 1, 31)"),
            (IDS[:, :0], "shape (rows, tokens)", "shape (1, 0)"),
            (IDS.float(), "shape (rows, tokens)", "got torch.float32"),
            (IDS > 7, "shape (rows, tokens)", "got torch.bool"),
            (IDS.to(torch.uint8), "shape (rows, tokens)", "got torch.uint8"),
            (IDS + 97, "ids from 0 to 100", "got 130"),
            (IDS - 5, "ids from 0 to 100", "got -2"),
        ]
    ),
    (lambda x: context(x, attention_mask=IDS[:, 1:]), "of the ids' shape", "got (1, 30)"),
    (lambda x: context(x, attention_mask=[1]), "an attention mask as a tensor", "got [1]"),
    (lambda x: context(x, chunk=True), "chunk as a whole number", "got True"),
    (lambda x: context(x, chunk=2.0), "chunk as a whole number", "got 2.0"),
    # writing
    (lambda x: generate(x, cache=x.model), "a cache of tappa.compressed", "got a LlamaFor"),
    (lambda x: generate(x, cache=x.context), "a cache of tappa.compressed", "its .cache()"),
    (lambda x: generate(x, cache=None), "a cache of tappa.compressed", "got a NoneType"),
    (lambda x: generate(x, max_new_tokens="3"), "max_new_tokens as a whole number", "got '3'"),
    (lambda x: generate(x, max_new_tokens=0), "max_new_tokens as a whole number", "got 0"),
    (lambda x: generate(x, temperature="0"), "temperature as a number", "got '0'"),
    (lambda x: generate(x, temperature=True), "temperature as a number", "got True"),
    (lambda x: generate(x, temperature=-0.5), "temperature as a number from 0 on", "got -0.5"),
    (lambda x: generate(x, attention_mask=[1]), "an attention mask as a tensor", "got [1]"),
    (lambda x: generate(x, stop="\n"), "stop as a function", "got '\\n'"),
    (lambda x: generate(x, show=7), "show as a function", "got 7"),
    # what it takes
    (lambda x: tappa.estimate("m", 7), "a model or its config", "got 'm'"),  # type: ignore[arg-type]
    (lambda x: tappa.estimate(x.model, 0, "full"), "prompt_tokens as a whole number", "got 0"),
    (lambda x: tappa.estimate(x.model, 7, "full", rows=True), "rows as a whole", "got True"),
    (lambda x: tappa.estimate(x.model, 7, "full", chunk=2.5), "chunk as a whole", "got 2.5"),  # type: ignore[arg-type]
    (lambda x: tappa.estimate(x.model, 7, "cake"), BUDGET, "got None"),
    # calibration and pruning
    (lambda x: calibrate(x, window="17"), "window as a whole number from 1", "got '17'"),
    (lambda x: calibrate(x, window=513), "windows of 8 to 512 tokens", "got 513"),
    (lambda x: calibrate(x, stride=0), "stride as a whole number from 1", "got 0"),
    (lambda x: calibrate(x, limit=2.5), "limit as a whole number from 1", "got 2.5"),
    (lambda x: calibrate(x, state=7), "the path of a file", "got 7"),
    (lambda x: x.calibration.merge(7), "a Calibration to merge", "got 7"),
    (lambda x: x.calibration.save(None), "the path of a file", "got None"),
    (lambda x: tappa.Calibration.load(None), "cannot read the calibration", "None"),  # type: ignore[arg-type]
    (lambda x: prune(x, 7, layers=1), "a Calibration of tappa.calibrate", "got 7"),
    (lambda x: prune(x, TEXT, layers=1), "a Calibration of tappa.calibrate", f"got {TEXT!r}"),
    (lambda x: prune(x, layer=1), "amounts of layers", "got 'layer'; did you mean 'layers'?"),
    (lambda x: prune(x, layers="1"), "layers to remove", "got '1'"),
    (lambda x: prune(x, layers=1.5), "a share of layers above 0 and below 1", "got 1.5"),
    (lambda x: prune(x, layers=True), "layers to remove", "got True"),
    (lambda x: prune(x, layers=2), "at least one must stay", "cannot remove 2 of 2"),
    (lambda x: prune(x, query_heads="2"), "query_heads as a whole number", "got '2'"),
    (lambda x: prune(x, query_heads=-1), "query_heads as a whole number from 0", "got -1"),
    (lambda x: prune(x, kv_groups=1.0), "kv_groups as a whole number", "got 1.0"),
    (lambda x: prune(x, layers=1, beta="0.3"), "beta as a number from 0 on", "got '0.3'"),
    (lambda x: prune(x, layers=1, beta=float("nan")), "beta as a number", "got nan"),
    (lambda x: prune(x, layers=1, seed=None), "seed as a whole number", "got None"),
    (lambda x: prune(x, layers=1, order=None), "an order of bi, bi_prime", "got None"),
    (lambda x: prune(x, layers=1, order="gredy"), "an order of", "did you mean 'greedy'?"),
    (
        lambda x: prune(x, layers=1, importance=[]),
        "the importance dissimilarity, output, mix",
        "got []",
    ),
    (lambda x: prune(x, layers=1, importance="outpt"), "importance", "did you mean 'output'?"),
    (lambda x: prune(x, layers=1, windows=TEXT), "windows as tappa.pruning.Windows", "got"),
]


@pytest.mark.parametrize(("call", "expected", "came"), CASES)
def test_one_line_says_what_was_expected_and_what_came(
    x: Any, call: Call, expected: str, came: str
) -> None:
    with pytest.raises(TappaError) as caught:
        call(x)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    assert expected in message
    assert came in message


def test_every_public_function_is_among_them() -> None:
    names = {*tappa.__all__} - {"TappaError"}
    source = Path(__file__).read_text()
    assert {name for name in names if f"tappa.{name}" not in source} == set()


def test_a_path_is_the_text_of_its_file(x: Any, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    assert analyze(x, path).heads == x.analysis.heads
    assert analyze(x, [TEXT, path]).prompts == [38, 38]
    found = calibrate(x, texts=path, stride=17)
    assert found.output.tolist() == x.calibration.output.tolist()


def test_whole_numbers_of_numpy_will_do(x: Any) -> None:
    assert analyze(x, tokens=np.int64(13)).prompts == [13]
    assert compressed(x, budget=np.int64(64), every=np.int64(7)).budget == 64
