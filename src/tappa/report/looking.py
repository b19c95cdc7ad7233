"""Run a model on a text and remember what a report shows of it: small maps, keys, what stays."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tappa.attention_profile import Attention, attention_rows, persistence
from tappa.capture import LayerView, prefill
from tappa.compression import record
from tappa.errors import CompressionError
from tappa.query_model import expected_rows
from tappa.report.views import LEVELS, STRETCH, Views
from tappa.tensor_parallel import HeadShards
from tappa.texts import MIN_TOKENS, encode_texts
from tappa.theory import spread_rows

TEXTS = 2  # of an analysis that are looked at
TOKENS = 512  # of a text that is shown,
LOOKS = 400_000  # and at most so many heads x tokens,
TOP = 3  # of each of which so many keys are remembered
MAX_SIZE = 256  # pixels of a map, less where there are many heads
PIXELS = 2_700_000  # of all maps of a text
BLOCK = 128  # rows at a time
ROWS = 32  # of each head, on which persistence is measured
BUDGETS = (0.1, 0.25, 0.5)  # of the tokens, in what methods keep
LEAST = 40  # tokens of a budget: below, methods that keep a window of 32 have nothing to choose
METHODS = ("streaming_llm", "h2o", "snapkv", "pyramidkv", "cake", "tappa")


def look(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    title: str = "text",
    tokens: int | None = None,
    methods: Sequence[str] = METHODS,
    progress: Callable[[int, int], None] | None = None,
) -> Views:
    """What every head does with the first tokens of a text (at most `tokens` and TOKENS)."""
    config = model.config.get_text_config()
    layers, heads = int(config.num_hidden_layers), int(config.num_attention_heads)
    most = max(MIN_TOKENS, min(tokens or TOKENS, TOKENS, LOOKS // max(layers * heads, 1)))
    ids = encode_texts(tokenizer, [text], most)[0]
    size = min(MAX_SIZE, len(ids), max(8, int((PIXELS / max(layers * heads, 1)) ** 0.5)))
    shifts = [2**n for n in range(len(ids).bit_length()) if 4 * 2**n <= len(ids)]
    parts: list[tuple[Tensor, ...]] = []

    def consume(view: LayerView) -> None:
        if progress is not None:
            progress(len(parts), layers + 1)
        drawn = picture(view.queries, view.keys, view.attention, size)
        parts.append((*drawn, persistence_curves(view, shifts).transpose(0, 1)))

    prefill(model, torch.tensor([ids]), consume, logits_to_keep=1)
    gather = HeadShards.of(model).gather
    every = [tuple(map(gather, part)) for part in parts]
    maps, keys, weights, curves = (torch.cat(x).numpy() for x in zip(*every, strict=True))
    shares = dict.fromkeys(max(int(len(ids) * share), LEAST) for share in BUDGETS)
    budgets = [budget for budget in shares if budget < len(ids)]
    kept = kept_tokens(model, ids, methods, budgets)
    return Views(
        title=title,
        tokens=[str(tokenizer.decode([i])) for i in ids],
        methods=list(methods) if kept.size else [],
        budgets=budgets if kept.size else [],
        shifts=shifts,
        maps=maps,
        keys=keys,
        weights=weights,
        kept=kept,
        persistence=np.ascontiguousarray(curves.swapaxes(0, 1)),
    )


def picture(
    queries: Float[Tensor, "heads tokens dim"],
    keys: Float[Tensor, "kv_heads tokens dim"],
    attention: Attention,
    size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(maps, keys, weights) of one layer, as in `Views`; no T x T matrix is held."""
    heads, tokens, dim = queries.shape
    group = heads // len(keys)
    positions = torch.arange(tokens, device=queries.device)
    cell = positions * size // tokens
    into = torch.nn.functional.one_hot(cell, size).to(queries.dtype)  # (tokens, size)
    sums = torch.zeros(heads, size, size, device=queries.device)
    counts = torch.zeros(size, size, device=queries.device)
    top = min(TOP, tokens)
    found_keys, found_weights = [], []
    columns = keys[:, None].mT.expand(-1, group, -1, -1)
    for start in range(0, tokens, BLOCK):
        rows = positions[start : start + BLOCK]
        grouped = queries[:, rows].view(len(keys), group, len(rows), dim)
        visible = attention.visible(rows, positions)
        logits = attention.logits(grouped, columns).view(heads, len(rows), tokens)
        weights = logits.masked_fill(~visible, -torch.inf).softmax(-1)
        sums.index_add_(1, cell[rows], weights @ into)
        counts.index_add_(0, cell[rows], visible.to(into.dtype) @ into)
        best = weights.topk(top, -1)
        found_keys.append(best.indices)
        found_weights.append((best.values * 100).round())
    mean = sums / counts.clamp_min(1)
    share = mean / mean.amax((1, 2), keepdim=True).clamp_min(1e-30)
    maps = (LEVELS * torch.log1p(STRETCH * share) / np.log1p(STRETCH)).round().to(torch.uint8)
    indices = torch.cat(found_keys, 1).to(torch.int32)
    return maps.cpu(), indices.cpu(), torch.cat(found_weights, 1).to(torch.uint8).cpu()


def persistence_curves(view: LayerView, shifts: Sequence[int]) -> Shaped[Tensor, "curves heads n"]:
    """How much attention persists after every shift, in the order of `CURVES`, in 255ths.

    `P(u, v) = mean_t sum_i min(A[t, i], A[t+u, i+v])` for (u, 0) and (u, u), over the same ROWS
    rows t for all shifts u: of the real queries, and of those that the query model expects.
    """
    heads, steps, _ = view.queries.shape
    device = view.queries.device
    if not shifts:
        return torch.zeros(4, heads, 0, dtype=torch.uint8)
    rows = spread_rows(torch.full((heads,), steps - max(shifts), device=device), ROWS)
    head = torch.arange(heads, device=device)[:, None]

    def observed(u: int) -> Tensor:
        at = rows + u
        where = (at + view.query_start, view.keys, view.attention, view.key_start)
        return attention_rows(view.queries[head, at], *where)

    expected = expected_rows(view, rows, [torch.full((heads,), u) for u in shifts])
    real, made = observed(0), next(expected)
    found = []
    for u, made_later in zip(shifts, expected, strict=True):
        pairs = ((real, observed(u)), (made, made_later))
        found.append(
            torch.stack(
                [
                    torch.stack([persistence(now[h], later[h], v) for h in range(heads)])
                    for now, later in pairs
                    for v in (0, u)
                ]
            )
        )
    return (torch.stack(found, -1) / rows.shape[1] * 255).round().to(torch.uint8).cpu()


def kept_tokens(
    model: PreTrainedModel, ids: Sequence[int], methods: Sequence[str], budgets: Sequence[int]
) -> Shaped[np.ndarray, "methods budgets kv_heads tokens"]:
    """Which tokens each method keeps; nothing where the prompt is too short to cut."""
    nothing = np.zeros((0, 0, 0, len(ids)), np.uint8)
    if not budgets or not methods:
        return nothing
    try:
        recording = record(model, torch.tensor([list(ids)]))
    except CompressionError:  # a model that can be analysed, but whose cache is of another kind
        return nothing
    found, gather = [], HeadShards.of(model).gather
    for method in methods:
        for cache in recording.compress(method, list(budgets)):
            rows: list[Tensor] = []
            for layer in cache.compressed_layers:
                held = layer.storage()
                split = held.figures["position"].split(held.lengths)
                masks = torch.zeros(len(split), len(ids), dtype=torch.uint8)
                for mask, positions in zip(masks, split, strict=True):
                    mask[positions.cpu().long()] = 1
                rows += gather(masks)
            found.append(torch.stack(rows))
    return torch.stack(found).unflatten(0, (len(methods), len(budgets))).numpy()
