"""Which layers and KV heads need their tokens: what the model loses when one alone is cut."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import spearmanr
from torch import Tensor
from transformers import PreTrainedModel

from tappa.analysis import Analysis
from tappa.cache_argument import with_cache
from tappa.compression import CompressedCache, record, stack_caches
from tappa.compression.layer import CompressedLayer
from tappa.compression.storage import RaggedKV
from tappa.similarity import VARIANTS

NEXT = 64  # true tokens that follow a prompt
KEPT = 64  # tokens that a cut layer or KV head keeps
TOGETHER = 16  # caches that go on side by side
Progress = Callable[[int, int], None]
FloatArray = Float[np.ndarray, "layers heads"]


@dataclass(frozen=True)
class Sensitivity:
    """KL to the full model when one layer, or one KV head, keeps `KEPT` tokens; n prompts."""

    layers: Float[np.ndarray, " layers"]
    heads: Float[np.ndarray, "layers kv_heads"]
    prompts: int


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman of `1 - S` with sensitivity, over layers or over KV heads."""

    grain: str
    variant: str
    value: float
    p: float
    n: int


@dataclass(frozen=True)
class LayerNeed:
    """A layer's `1 - S` (before RoPE, all pairs of the prompt) and what cutting it costs."""

    layer: int
    dissimilarity: float
    kl: float


def measure_sensitivity(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    method: str = "snapkv",
    progress: Progress | None = None,
) -> Sensitivity:
    """Cut one layer (then one KV head) at a time; each prompt ends with NEXT tokens to predict.

    The tokens that stay are those of `method`. KL is the mean over the NEXT tokens of the
    divergence from the full cache, in nats.
    """
    totals: list[tuple[np.ndarray, np.ndarray]] = []
    for number, ids in enumerate(prompts):
        context, following = list(ids[:-NEXT]), list(ids[-NEXT:])
        recording = record(model, torch.tensor([context[:-1]]))
        full = recording.compress("full", [None])[0]
        small = recording.compress(method, [KEPT])[0]
        tail = torch.tensor([[context[-1], *following[:-1]]], device=model.device)
        reference = _log_p(model, full.copy(), tail)[0]
        layers = len(full.compressed_layers)
        kv_heads = full.compressed_layers[0].storage().kv_heads
        places = [(layer, None) for layer in range(layers)]
        places += [(layer, head) for layer in range(layers) for head in range(kv_heads)]  # type: ignore[misc]
        found: list[float] = []
        for start in range(0, len(places), TOGETHER):
            if progress is not None:
                progress(number * len(places) + start, len(prompts) * len(places))
            caches = [_cut(full, small, *place) for place in places[start : start + TOGETHER]]
            logs = _log_p(model, stack_caches(caches), tail.expand(len(caches), -1))
            for row in logs:
                found.append(float((reference.exp() * (reference - row)).sum(-1).mean()))
        heads = np.array(found[layers:]).reshape(layers, kv_heads)
        totals.append((np.array(found[:layers]), heads))
    return Sensitivity(
        np.mean([layer for layer, _ in totals], 0),
        np.mean([heads for _, heads in totals], 0),
        len(totals),
    )


def correlate(sensitivity: Sensitivity, analysis: Analysis) -> list[RankCorrelation]:
    """Whether layers and KV heads with low q-similarity need more tokens, in every variant."""
    frame = analysis.to_frame()
    found = []
    for variant in VARIANTS:
        name = f"q_similarity_{variant}"
        by_layer = 1 - frame.groupby("layer")[name].mean().to_numpy(float)
        by_head = 1 - frame.groupby(["layer", "kv_head"])[name].mean().to_numpy(float)
        for grain, x, y in (
            ("layers", by_layer, sensitivity.layers),
            ("KV heads", by_head, sensitivity.heads.ravel()),
        ):
            if len(x) == len(y) > 2:
                done = spearmanr(x, y)
                found.append(
                    RankCorrelation(
                        grain, str(variant), float(done.statistic), float(done.pvalue), len(x)
                    )
                )
    return found


def layer_needs(sensitivity: Sensitivity, analysis: Analysis) -> list[LayerNeed]:
    """One for each layer; none where the model caches fewer layers than it analyses."""
    s = analysis.to_frame().groupby("layer")["q_similarity_pre_all_prompt"].mean()
    if len(s) != len(sensitivity.layers):
        return []
    return [
        LayerNeed(int(layer), 1 - float(value), float(kl))
        for (layer, value), kl in zip(s.items(), sensitivity.layers, strict=True)
    ]


def _cut(
    full: CompressedCache, small: CompressedCache, layer: int, head: int | None
) -> CompressedCache:
    """The full cache, but for one layer or one KV head of it."""
    twin = full.copy()
    mine, other = twin.compressed_layers[layer], small.compressed_layers[layer]
    if head is None:
        mine.held = other.storage().copy()
    else:
        mine.held = _one_head(mine, other, head)
    mine.complete = False
    return twin


def _one_head(full: CompressedLayer, small: CompressedLayer, head: int) -> RaggedKV:
    """One KV head of the small cache, the others of the full one."""
    parts = [part.storage() for part in (full, small)]
    kv_heads = parts[0].kv_heads

    def take(tensors: list[Tensor]) -> Tensor:
        split = [x.split(part.lengths) for x, part in zip(tensors, parts, strict=True)]
        return torch.cat([split[g == head][g] for g in range(kv_heads)])

    figures = {"position": take([part.figures["position"] for part in parts])}
    lengths = [parts[g == head].lengths[g] for g in range(kv_heads)]
    keys, values = take([p.keys for p in parts]), take([p.values for p in parts])
    return RaggedKV(keys, values, lengths, kv_heads, figures)


def _log_p(
    model: PreTrainedModel, cache: CompressedCache, tail: Tensor
) -> Float[Tensor, "rows new vocabulary"]:
    cache.frozen = True
    with torch.inference_mode():
        logits = cast(Tensor, model(tail, **with_cache(model, cache)).logits)
    return logits.float().log_softmax(-1)
