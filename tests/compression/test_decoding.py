"""Writing on in fixed steps: the same tokens, kept and written, as through the cache."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import tappa
from near_ties import watched
from tappa.cache_argument import with_cache
from tappa.compression import (
    CompressedCache,
    compressed,
    generate,
    record,
    stack_caches,
    stacking,
)
from tappa.compression.fixed import FixedKV
from tappa.errors import CompressionError, NonFiniteError
from tiny import tiny_model as make_tiny

tiny_model: Callable[..., Any] = make_tiny
PROMPT = torch.randint(3, 90, (1, 211), generator=torch.Generator().manual_seed(0))
SMALL: dict[str, Any] = {"window": 7, "every": 5}
METHODS: list[tuple[str, dict[str, Any]]] = [
    *(("tappa", {}), ("tappa", {"per_head": True}), ("adakv", {}), ("snapkv", {}), ("cake", {})),
    *(("tappa_paper", {}), ("streaming_llm", {}), ("pyramidkv", {}), ("duo_attention", {})),
]


@pytest.fixture(autouse=True)
def nothing_is_zero_by_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers start as NaN: what nobody wrote must not be read."""
    plain = FixedKV.__init__

    def poisoned(self: FixedKV, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        self.keys.fill_(torch.nan)
        self.values.fill_(torch.nan)

    monkeypatch.setattr(FixedKV, "__init__", poisoned)


def endless(kind: str = "llama", **changes: Any) -> Any:
    """A model without a token that ends the text."""
    model = tiny_model(kind, **changes)
    model.generation_config.eos_token_id = None
    return model


def by_transformers(model: Any, cache: CompressedCache, ids: Tensor, new: int, **o: Any) -> Tensor:
    options = {"do_sample": False, "pad_token_id": 0} | o
    return model.generate(ids, **with_cache(model, cache), max_new_tokens=new, **options)


def held(cache: CompressedCache) -> list[list[int]]:
    rows = cache.compressed_layers[0].rows
    heads, layers = range(3), range(len(cache.layers))
    return [cache.positions_held(n, h, row) for n in layers for h in heads for row in range(rows)]


@pytest.mark.parametrize(("name", "options"), METHODS)
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_fixed_steps_write_and_keep_what_the_cache_does(
    kind: str, name: str, options: dict[str, Any]
) -> None:
    """Through many cuts, and to the end of what is asked for."""
    model = endless(kind)
    caches = [compressed(model, name, 23, **SMALL | options) for _ in range(2)]
    with watched(model) as seen:
        expected = by_transformers(model, caches[0], PROMPT[:, :97], 41)
    actual = generate(caches[1], PROMPT[:, :97], 41, graph=True)
    if seen.check_text(actual, expected, least=30):
        assert held(caches[1]) == held(caches[0])
    assert caches[1].tokens_seen == 97 + 40
    assert caches[1].tokens_held() <= 23


@pytest.mark.parametrize("budget", [23, 0.3, 500])
@pytest.mark.parametrize("prompt", [9, 37])
def test_short_prompts_grow_into_the_budget(prompt: int, budget: float) -> None:
    """Layers that hold all of a prompt take more later, beyond what was foreseen for them."""
    model = endless(num_hidden_layers=5)
    caches = [compressed(model, "tappa", budget, **SMALL) for _ in range(2)]
    with watched(model) as seen:
        expected = by_transformers(model, caches[0], PROMPT[:, :prompt], 61)
    actual = generate(caches[1], PROMPT[:, :prompt], 61, graph=True)
    if seen.check_text(actual, expected, least=40):
        assert held(caches[1]) == held(caches[0])


@pytest.mark.parametrize("name", ["tappa", "snapkv", "full"])
def test_padded_rows_write_what_they_do_alone(name: str) -> None:
    model = endless()
    ids = PROMPT[:, :194].view(2, 97).clone()
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    options = {} if name == "full" else SMALL
    batch = generate(
        compressed(model, name, 23, **options), ids, 29, attention_mask=mask, graph=True
    )
    for row, start in ((0, 20), (1, 0)):
        alone = compressed(model, name, 23, **options)
        mine = ids[row : row + 1, start:]
        with watched(model) as seen:
            expected = by_transformers(model, compressed(model, name, 23, **options), mine, 29)
        for found in (batch[row : row + 1, start:], generate(alone, mine, 29, graph=True)):
            seen.check_text(found, expected, least=20)


def test_the_cache_goes_on_after_fixed_steps() -> None:
    """Another piece of text, then more steps: as if there had been no fixed steps at all."""
    model = endless()
    plain, fixed = (compressed(model, "tappa", 23, **SMALL) for _ in range(2))
    ids = PROMPT[:, :97]
    for new, more in ((19, PROMPT[:, 100:103]), (17, PROMPT[:, :0])):
        with watched(model) as seen:
            expected = generate(plain, ids, new, graph=False)
        assert seen.check_text(generate(fixed, ids, new, graph=True), expected, least=new)
        ids = torch.cat([expected, more], 1)
    assert held(plain) == held(fixed)


def test_rows_end_where_transformers_ends_them() -> None:
    model = tiny_model("llama")
    ids = PROMPT.roll(1, 1)[:, :210].view(3, 70)
    other = endless()
    free = by_transformers(other, compressed(other, "full"), ids, 40)[:, 70:]
    ends = [int(free[0, 3]), int(free[1, 11])]  # rows end early, at different steps
    model.generation_config.eos_token_id = ends
    model.generation_config.pad_token_id = 1
    for name in ("full", "tappa"):
        options = {} if name == "full" else SMALL
        for given in (ids, ids[:2]):
            cache = compressed(model, name, 30, **options)
            twin = compressed(model, name, 30, **options)
            with watched(model) as seen:
                expected = by_transformers(model, twin, given, 40, pad_token_id=1)
            for graph in (True, False):
                cache.reset()
                found = generate(cache, given, 40, graph=graph)
                assert seen.check_text(found, expected, least=11)
                assert cache.tokens_seen == twin.tokens_seen == expected.shape[1] - 1


@pytest.mark.parametrize("packed", [False, True])
def test_a_prompt_that_was_read_and_a_stack_of_caches(
    packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the evaluation does: all but the last token is known, nothing more is dropped."""
    monkeypatch.setattr(stacking, "runs_on", lambda x: packed)
    model = endless()
    recording = record(model, PROMPT[:, :96])
    budgets = [23, 41, 61]
    caches = recording.compress("tappa", budgets, **SMALL)
    for cache in caches:
        cache.frozen = True
    stacked = stack_caches([cache.copy() for cache in caches])
    actual = generate(stacked, PROMPT[:, :97].expand(3, -1), 21, graph=True)
    for row, cache in enumerate(caches):
        with watched(model) as seen:
            alone = by_transformers(model, cache.copy(), PROMPT[:, :97], 21)
        seen.check_text(actual[row : row + 1], alone, least=15)
    assert stacked.tokens_seen == 96 + 21
    assert stacked.tokens_held(row=2) == pytest.approx(caches[2].tokens_held() + 21)
    with torch.inference_mode():
        logits = model(PROMPT[:, :1].expand(3, -1), **with_cache(model, stacked)).logits
    assert torch.isfinite(logits).all()


COMPILED = """
import torch
from tappa.compression import compressed, generate
from tiny import tiny_model

graphs = []
plain = torch.compile
def backend(module, inputs):
    graphs.append(module)
    return module.forward
torch.compile = lambda f, **options: plain(f, backend=backend, **options)
model = tiny_model("llama")
model.generation_config.eos_token_id = None
ids = torch.randint(3, 90, (2, 97), generator=torch.Generator().manual_seed(0))
for name, rows, prompt, budget, new in (
    ("tappa", 1, 97, 23, 41), ("snapkv", 1, 60, 30, 20), ("full", 2, 10, None, 5)
):
    options = {} if budget is None else {"window": 7, "every": 5}
    made = []
    for compiled in (False, True):
        cache = compressed(model, name, budget, **options)
        made.append(generate(cache, ids[:rows, :prompt], new, graph=True, compiled=compiled))
    print(torch.equal(*made), len(graphs))
"""


@pytest.mark.same_kernel
def test_a_compiled_step_serves_every_prompt() -> None:
    """Of any length and budget; another batch size is another graph. Its operations are the same.

    In a process without type checks, which torch.compile would see.
    """
    paths = [str(Path(tappa.__file__).parents[1]), str(Path(__file__).parents[1])]
    done = subprocess.run(
        [sys.executable, "-c", COMPILED],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )
    same, counts = zip(*(line.split() for line in done.stdout.splitlines()), strict=True)
    assert same == ("True", "True", "True")
    assert counts[0] == counts[1]
    if Version(transformers.__version__) >= Version("5.3"):  # before, its code made several graphs
        assert counts == ("1", "1", "2")


def test_stop_and_show_see_all_tokens() -> None:
    model = endless()
    shown: list[Tensor] = []

    def stop(ids: Tensor) -> Tensor:
        return torch.tensor([ids.shape[1] >= 97 + 30])

    cache = compressed(model, "tappa", 23, **SMALL)
    ids = generate(cache, PROMPT[:, :97], 90, graph=True, show=shown.append, stop=stop)
    assert torch.equal(torch.cat([PROMPT[:, :97], *shown], 1), ids)
    assert 97 + 30 <= ids.shape[1] <= 97 + 30 + 16


@pytest.mark.parametrize(
    ("kind", "name", "reason"),
    [
        ("gemma3", "tappa", "sliding window"),
        ("llama", "h2o", "h2o scores tokens by received"),
        ("llama", "expected_attention", "by moments"),
    ],
)
def test_what_cannot_be_done_in_fixed_steps(kind: str, name: str, reason: str) -> None:
    """It says why if it must, and takes the other path if it may."""
    model = endless(kind)
    with pytest.raises(CompressionError, match=reason):
        generate(compressed(model, name, 23, **SMALL), PROMPT[:, :97], 9, graph=True)
    with watched(model) as seen:
        expected = by_transformers(model, compressed(model, name, 23, **SMALL), PROMPT[:, :97], 9)
    found = generate(compressed(model, name, 23, **SMALL), PROMPT[:, :97], 9)
    seen.check_text(found, expected, least=7)


def test_a_prompt_that_the_cache_knows_needs_another_token() -> None:
    model = endless()
    cache = compressed(model, "tappa", 23, **SMALL)
    generate(cache, PROMPT[:, :97], 3)
    with pytest.raises(CompressionError, match="call reset"):
        generate(cache, PROMPT[:, :50], 3)


def test_drawn_tokens_follow_the_distribution() -> None:
    model: PreTrainedModel = endless()
    rows = 400
    torch.manual_seed(0)
    cache = compressed(model, "full")
    ids = generate(cache, PROMPT[:, :5].expand(rows, -1), 2, temperature=0.5, graph=True)
    with torch.inference_mode():
        first: Any = model(PROMPT[:, :5])
    expected = (first.logits[0, -1] / 0.5).softmax(-1)
    found = ids[:, 5].bincount(minlength=101) / rows
    assert (found - expected).abs().sum() < 0.35  # of two distributions at most 2
    assert len(set(ids[:, 6].tolist())) > 5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_ids": PROMPT[0]}, "expected token ids of shape"),
        ({"input_ids": PROMPT.float()}, "expected token ids of shape"),
        ({"input_ids": PROMPT.tolist()}, "expected token ids as a tensor"),
        ({"input_ids": PROMPT + 90}, "expected ids from 0 to 100, got 1"),
        ({"max_new_tokens": 0}, "max_new_tokens as a whole number from 1 on, got 0"),
        ({"max_new_tokens": 2.0}, "max_new_tokens as a whole number from 1 on, got 2.0"),
        ({"temperature": -1.0}, "temperature as a number from 0 on, got -1.0"),
        ({"temperature": float("nan")}, "temperature as a number from 0 on, got nan"),
        ({"attention_mask": torch.ones(1, 3, dtype=torch.int64)}, "mask of the ids' shape"),
        ({"attention_mask": (PROMPT > 0).long().index_fill(1, torch.tensor([210]), 0)}, "the left"),
        ({"attention_mask": (PROMPT > 0).long().index_fill(1, torch.tensor([50]), 0)}, "the left"),
        ({"compiled": True}, "compiled steps need a GPU"),
    ],
)
@pytest.mark.usefixtures("as_users_run_it")
def test_what_cannot_be_written_on(given: dict[str, Any], message: str) -> None:
    cache = compressed(tiny_model("llama"), "tappa", 40)
    arguments: dict[str, Any] = {"input_ids": PROMPT, "max_new_tokens": 5, **given}
    with pytest.raises(CompressionError, match=message) as caught:
        generate(cache, **arguments)
    assert "\n" not in str(caught.value)
    assert cache.tokens_seen == 0


@pytest.mark.usefixtures("as_users_run_it")
def test_only_our_own_cache_can_be_written_on() -> None:
    other: Any = DynamicCache()
    with pytest.raises(CompressionError, match=r"a cache of tappa\.compressed, got a DynamicCache"):
        generate(other, PROMPT, 5)


def test_nan_weights_are_told() -> None:
    model = tiny_model("llama")
    model.model.norm.weight.data[3] = torch.nan
    with pytest.raises(NonFiniteError, match="NaN among the logits"):
        generate(compressed(model, "tappa", 40), PROMPT, 5)
