"""What tappa and kvpress score and keep of one prompt, in the same form."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from kvpress import ScorerPress
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import tappa
from tappa.cache_argument import with_cache
from tappa.compression import Method
from tappa.compression.scorers import Scores, TokenView

Kept = list[list[list[int]]]  # positions, rising, of every layer and KV head


@dataclass
class Run:
    """Scores of every layer, (layers, kv_heads, tokens), and the positions that stay."""

    scores: Float[Tensor, "layers kv_heads tokens"]
    kept: Kept


def ours(model: PreTrainedModel, ids: Tensor, method: Method, budget: int) -> Run:
    """Run the model once on a compressed cache; the scorer is replaced by one that remembers."""
    seen: list[Scores] = []

    def score(tokens: TokenView) -> Scores:
        seen.append(method.scorer.score(tokens))
        return seen[-1]

    spied = replace(method, scorer=replace(method.scorer, score=score))
    cache = tappa.compressed(model, spied, budget)
    with torch.inference_mode():
        model(ids, **with_cache(model, cache), logits_to_keep=1)
    assert len(seen) == len(cache.layers), "a layer was scored more than once"
    heads = range(seen[0].shape[0])
    kept = [[cache.positions_held(i, head) for head in heads] for i in range(len(seen))]
    return Run(torch.stack(seen), kept)


def theirs(model: PreTrainedModel, ids: Tensor, press: ScorerPress) -> Run:
    """Run the model once under a press. What it keeps is read from the keys in its cache."""
    seen: list[Tensor] = []
    before: list[Tensor] = []
    original = press.score

    def score(module, hidden_states, keys, values, attentions, kwargs):
        seen.append(original(module, hidden_states, keys, values, attentions, kwargs))
        before.append(keys)
        return seen[-1]

    press.score = score
    cache = DynamicCache()
    with torch.inference_mode(), press(model):
        model.model(ids, **with_cache(model.model, cache))
    kept = [
        positions_of(layer.keys[0], full[0])
        for layer, full in zip(cache.layers, before, strict=True)
    ]
    return Run(torch.cat(seen), kept)


def positions_of(
    held: Float[Tensor, "kv_heads held dim"], full: Float[Tensor, "kv_heads tokens dim"]
) -> list[list[int]]:
    """Where in the full keys each key held stands: keys are copied, so they are equal bit by bit.

    Four channels tell keys apart; then all are compared. Raises AssertionError for a key that is
    found nowhere, or twice.
    """
    equal = (held[:, :, None, :4] == full[:, None, :, :4]).all(-1)
    assert bool((equal.sum(2) == 1).all())
    at = equal.int().argmax(2)
    assert torch.equal(full.gather(1, at[..., None].expand_as(held)), held)
    return [sorted(row) for row in at.tolist()]
