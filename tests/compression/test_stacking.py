"""Caches stacked as the rows of a batch answer as each does alone."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import tappa
from near_ties import watched
from tappa.cache_argument import with_cache
from tappa.compression import CompressedCache, record, stack_caches, stacking
from tappa.errors import CompressionError
from tiny import tiny_model

PROMPTS = torch.randint(3, 90, (2, 53), generator=torch.Generator().manual_seed(0))
TAIL = torch.randint(3, 90, (2, 4), generator=torch.Generator().manual_seed(1))
CELLS: list[tuple[str, list[int | None]]] = [
    ("full", [None]),
    ("snapkv", [11, 23]),
    ("tappa", [17]),
]


@pytest.fixture(params=["padded", "packed"], autouse=True)
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Padded as on a CPU, or packed as on a GPU."""
    if request.param == "packed":
        monkeypatch.setattr(stacking, "runs_on", lambda x: True)
        monkeypatch.setattr(stacking.PackedLayer, "ROOM", 5)  # so that segments have to move
    return str(request.param)


def caches_of(model: PreTrainedModel, prompt: torch.Tensor) -> list[CompressedCache]:
    recording = record(model, prompt[None])
    found: list[CompressedCache] = []
    for method, budgets in CELLS:
        options: dict[str, Any] = {} if method == "full" else {"window": 7}
        found += recording.compress(method, budgets, **options)
    for cache in found:
        cache.frozen = True
    return found


def run(model: Any, ids: torch.Tensor, cache: Any, **options: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids, **with_cache(model, cache), **options).logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "phi3"])
def test_rows_answer_as_each_cache_alone(kind: str, attention: str) -> None:
    """In one piece of three tokens, then one by one."""
    model = tiny_model(kind)
    model.config._attn_implementation = attention
    caches = caches_of(model, PROMPTS[0])
    stacked = stack_caches(caches)
    assert stacked.nbytes == sum(
        cache.nbytes for cache in caches
    )  # sliding windows and all, without padding
    for piece in (TAIL[:1, :3], TAIL[:1, 3:], TAIL[:1, 2:3]):
        alone = [run(model, piece, cache) for cache in caches]
        together = run(model, piece.expand(len(caches), -1), stacked)
        torch.testing.assert_close(together, torch.cat(alone), atol=2e-5, rtol=1e-4)
    assert stacked.nbytes == sum(cache.nbytes for cache in caches)
    assert [stacked.tokens_held(row=i) for i in range(4)] == [c.tokens_held() for c in caches]


def test_prompts_of_different_lengths_are_told_apart_by_the_mask() -> None:
    model = tiny_model("llama")
    prompts = [PROMPTS[0], PROMPTS[1, :41]]
    caches = [caches_of(model, prompt)[2] for prompt in prompts]
    stacked = stack_caches([cache.copy() for cache in caches])
    tails = [TAIL[0], TAIL[1]]
    alone = [run(model, tail[None], cache) for tail, cache in zip(tails, caches, strict=True)]
    assert stacked.tokens_seen == 53
    mask = torch.ones(2, 53 + 4, dtype=torch.int64)
    mask[1, :12] = 0
    positions = (mask.cumsum(1) - 1)[:, -4:]
    together = run(model, torch.stack(tails), stacked, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(together, torch.cat(alone), atol=2e-5, rtol=1e-4)


def test_generating_from_a_stack() -> None:
    """The model's own generate, on prompts padded on the left."""
    model: Any = tiny_model("llama")
    short = PROMPTS[1, :41]
    model.generation_config.eos_token_id = None
    caches = [caches_of(model, prompt[:-1])[1] for prompt in (PROMPTS[0], short)]
    padded = torch.stack([PROMPTS[0], torch.cat([torch.zeros(12, dtype=torch.int64), short])])
    mask = torch.ones_like(padded)
    mask[1, :12] = 0
    together = model.generate(
        padded,
        attention_mask=mask,
        **with_cache(model, stack_caches([cache.copy() for cache in caches])),
        max_new_tokens=13,
    )
    for row, (prompt, cache) in enumerate(zip((PROMPTS[0], short), caches, strict=True)):
        with watched(model) as seen:
            alone = model.generate(prompt[None], **with_cache(model, cache), max_new_tokens=13)
        seen.check_text(together[row : row + 1, 53 - len(prompt) :], alone, least=10)


def test_rows_of_a_stack_can_be_taken_and_copied() -> None:
    model = tiny_model("llama")
    caches = caches_of(model, PROMPTS[0])
    stacked = stack_caches(caches)
    twin = stacked.copy()
    twin.batch_select_indices(torch.tensor([3, 1]))
    assert twin.nbytes == caches[3].nbytes + caches[1].nbytes
    assert twin.positions_held(0, 0, row=1) == caches[1].positions_held(0, 0)
    first = run(model, TAIL[:1].expand(4, -1), stacked)
    taken = run(model, TAIL[:1].expand(2, -1), twin)
    torch.testing.assert_close(taken, first[[3, 1]], atol=2e-5, rtol=1e-4)
    with pytest.raises(CompressionError, match="cannot be cropped"):
        stacked.crop(-1)


def test_what_cannot_be_stacked() -> None:
    model, other = tiny_model("llama"), tiny_model("llama")
    cache = caches_of(model, PROMPTS[0])[1]
    with pytest.raises(CompressionError, match="at least one cache"):
        stack_caches([])
    with pytest.raises(CompressionError, match="read something"):
        stack_caches([cache, tappa.compressed(model, "snapkv", 64)])
    with pytest.raises(CompressionError, match="of one model"):
        stack_caches([cache, caches_of(other, PROMPTS[0])[1]])
    sliding = tiny_model("gemma3")
    with pytest.raises(CompressionError, match="prompts of one length"):
        stack_caches([caches_of(sliding, p)[1] for p in (PROMPTS[0], PROMPTS[0, :31])])
