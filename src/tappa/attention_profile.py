"""What the attention of a head does, without ever holding a T x T matrix.

`attention_profile` is what to call; `attention_profile_reference` says what it computes.
Both take post-RoPE queries and keys of one layer and one prompt without padding, and return sums
over rows (queries), so that profiles of chunks and of prompts add up.
"""

from dataclasses import asdict, dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tappa import kernels
from tappa.similarity import lag_counts, lag_sums

SINK_TOKENS = 4  # the first tokens of a prompt, where sinks sit


@dataclass(frozen=True)
class Attention:
    """How a layer attends: everything about its softmax that is not in queries and keys."""

    scale: float  # logits are scale * q.k
    window: int | None = None  # a query sees this many keys, itself included (None: all before it)
    softcap: float | None = None  # logits become cap * tanh(logit / cap)

    def visible(
        self, rows: Int[Tensor, "*batch rows"], columns: Int[Tensor, " columns"]
    ) -> Bool[Tensor, "*batch rows columns"]:
        """Which keys a query sees, by position: not later ones, nor those before its window."""
        lag = rows[..., None] - columns
        return (lag >= 0) if self.window is None else (lag >= 0) & (lag < self.window)

    def logits(
        self, queries: Float[Tensor, "*batch rows dim"], keys: Float[Tensor, "*batch dim columns"]
    ) -> Float[Tensor, "*batch rows columns"]:
        """Logits before the mask."""
        logits = torch.matmul(queries * self.scale, keys)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def visible_keys(self, rows: Int[Tensor, " rows"]) -> Int[Tensor, " rows"]:
        """How many keys each query sees."""
        return (rows + 1).clamp_max(self.window) if self.window else rows + 1


@dataclass
class AttentionProfile:
    """Sums over the rows of a prompt, per query head (H heads, N keys, `lags` lags).

    `rows` rows were seen, `sink_rows` of them past the first tokens, `pairs` pairs of neighbours.
    """

    rows: int
    sink_rows: int
    pairs: int
    sink_mass: Tensor  # (H,) attention on the first SINK_TOKENS tokens, over sink_rows
    entropy: Tensor  # (H,) row entropy / log(keys seen); a row of one key counts as 0
    vertical: Tensor  # (H,) sum over pairs of sum_i min(A[t, i], A[t+1, i])
    diagonal: Tensor  # (H,) sum over pairs of sum_i min(A[t, i], A[t+1, i+1])
    column_mass: Tensor  # (H, N) attention that each key receives
    lag_attention: Tensor  # (H, lags) attention at distance t - i
    lag_logits: Tensor  # (H, lags) logits at distance t - i
    lag_counts: Tensor  # (lags,) visible (t, i) at each distance

    def add(self, later: "AttentionProfile") -> None:
        """Accumulate the profile of the next chunk of the same prompt (its keys include ours)."""
        grown = later.column_mass
        grown[:, : self.column_mass.shape[1]] += self.column_mass
        self.column_mass = grown
        for name in ADDITIVE:
            setattr(self, name, getattr(self, name) + getattr(later, name))


# what `add` sums; column_mass is padded first, since later chunks see more keys
ADDITIVE = (
    *("rows", "sink_rows", "pairs", "sink_mass", "entropy", "vertical", "diagonal"),
    *("lag_attention", "lag_logits", "lag_counts"),
)


def attention_profile_reference(
    queries: Float[Tensor, "heads tokens dim"],
    keys: Float[Tensor, "kv_heads tokens dim"],
    attention: Attention,
    lags: int,
) -> AttentionProfile:
    """The profile of a whole prompt from its full attention matrix, in float64: for tests."""
    heads, tokens, _ = queries.shape
    queries = queries.double()
    keys = keys.double().repeat_interleave(heads // keys.shape[0], dim=0)
    rows = torch.arange(tokens)
    visible = attention.visible(rows, rows)
    weights = attention.logits(queries, keys.mT).masked_fill(~visible, -torch.inf).softmax(-1)
    at_lag = [((rows[:, None] - rows) == lag) & visible for lag in range(lags)]
    products = attention.scale * queries @ keys.mT
    seen = attention.visible_keys(rows)
    entropy = torch.special.entr(weights).sum(-1)[:, seen > 1] / seen[seen > 1].log()
    return AttentionProfile(
        rows=tokens,
        sink_rows=max(tokens - SINK_TOKENS, 0),
        pairs=tokens - 1,
        sink_mass=weights[:, SINK_TOKENS:, :SINK_TOKENS].sum((1, 2)),
        entropy=entropy.sum(-1),
        vertical=torch.minimum(weights[:, :-1], weights[:, 1:]).sum((1, 2)),
        diagonal=torch.minimum(weights[:, :-1, :-1], weights[:, 1:, 1:]).sum((1, 2)),
        column_mass=weights.sum(1),
        lag_attention=torch.stack([(weights * at).sum((1, 2)) for at in at_lag], -1),
        lag_logits=torch.stack([(products * at).sum((1, 2)) for at in at_lag], -1),
        lag_counts=torch.stack([at.sum() for at in at_lag]),
    )


def attention_profile(
    queries: Float[Tensor, "heads steps dim"],
    keys: Float[Tensor, "kv_heads past dim"],
    attention: Attention,
    lags: int,
    query_start: int = 0,
    key_start: int = 0,
    previous: Float[Tensor, "heads dim"] | None = None,
) -> AttentionProfile:
    """The profile of one chunk of a prompt: queries from position `query_start` on.

    `keys` holds every key that these queries may see, from position `key_start` on (not 0 when a
    sliding-window cache has dropped some); `previous` is the query just before the chunk, so that
    the pair across the border is counted too. Time O(T^2 d), memory O(T), without repeating keys
    for GQA: on a GPU by Triton kernels, else in blocks of whole rows that fit the cache.
    """
    steps, past = queries.shape[1], keys.shape[1]
    if previous is not None:
        queries = torch.cat([previous[:, None], queries], dim=1)
    profile = _empty(queries, past + key_start, lags, query_start, steps, previous is not None)
    lag_start = query_start - key_start
    visible = torch.arange(lags) < (attention.window or lags)
    profile.lag_counts = lag_counts(steps, past, lags, lag_start) * visible
    sums = kernels.profile_sums(
        *(queries, keys, lags, SINK_TOKENS),
        **asdict(attention),
        query_start=query_start,
        key_start=key_start,
        has_previous=previous is not None,
    )
    if sums is None:
        _add_blocks(profile, queries.float(), keys.float(), attention, query_start, key_start)
    else:
        vars(profile).update(sums)
    return profile


def _add_blocks(
    profile: AttentionProfile,
    queries: Float[Tensor, "heads rows dim"],
    keys: Float[Tensor, "kv_heads past dim"],
    attention: Attention,
    query_start: int,
    key_start: int,
) -> None:
    """Add all rows from `query_start` on; the queries may start with the one before."""
    heads, rows, _ = queries.shape
    kv_heads, past, _ = keys.shape
    steps, lags = profile.rows, len(profile.lag_counts)
    start = query_start + steps - rows  # position of the first row
    grouped = queries.view(kv_heads, heads // kv_heads, *queries.shape[1:])
    kv_step, row_step = _block_shape(heads // kv_heads, kv_heads, past, queries.device)
    for kv in range(0, kv_heads, kv_step):
        for row in range(query_start, query_start + steps, row_step):
            low, high = max(row - 1, start), min(row + row_step, query_start + steps)
            first_key = key_start
            if attention.window is not None:
                first_key = max(key_start, low - attention.window + 1)
            block = grouped[kv : kv + kv_step, :, low - start : high - start]
            block_keys = keys[kv : kv + kv_step, first_key - key_start : high - key_start]
            group = slice(kv * (heads // kv_heads), (kv + kv_step) * (heads // kv_heads))
            _add_block(profile, group, block, block_keys, attention, low, first_key, row - low)
    fresh = queries[:, query_start - start :]
    visible = torch.arange(lags, device=queries.device) < (attention.window or lags)
    for kv in range(kv_heads):  # one at a time: the FFT keeps (size, dim) numbers for each head
        group = slice(kv * (heads // kv_heads), (kv + 1) * (heads // kv_heads))
        products = lag_sums(fresh[group], keys[kv : kv + 1], lags, query_start - key_start)
        profile.lag_logits[group] = attention.scale * products * visible


def attention_rows(
    queries: Float[Tensor, "heads rows dim"],
    positions: Int[Tensor, "heads rows"],
    keys: Float[Tensor, "kv_heads past dim"],
    attention: Attention,
    key_start: int = 0,
) -> Float[Tensor, "heads rows past"]:
    """Full rows of attention of a few queries at any positions."""
    heads, rows, dim = queries.shape
    kv_heads, past, _ = keys.shape
    columns = torch.arange(key_start, key_start + past, device=keys.device)
    logits = attention.logits(queries.view(kv_heads, -1, dim), keys.mT).view(heads, rows, past)
    hidden = ~attention.visible(positions, columns)
    return logits.masked_fill_(hidden, torch.finfo(logits.dtype).min).softmax(-1)


def persistence(
    now: Float[Tensor, "*heads rows keys"],
    later: Float[Tensor, "*heads rows keys"],
    v: int | Int[Tensor, "*heads"],
) -> Float[Tensor, "*heads"]:
    """`P(u, v) = sum_i min(A[t, i], A[t+u, i+v])`, summed over rows t; v may differ by head."""
    keys = now.shape[-1]
    if isinstance(v, int):
        return torch.minimum(now[..., : keys - v], later[..., v:]).sum((-1, -2))
    at = torch.arange(keys, device=now.device) + v[..., None, None]
    moved = later.gather(-1, at.clamp_max(keys - 1).expand_as(later)).masked_fill_(at >= keys, 0)
    return torch.minimum(now, moved).sum((-1, -2))


def _empty(
    like: Tensor, keys: int, lags: int, query_start: int, steps: int, has_previous: bool
) -> AttentionProfile:
    """A profile of zeros with the counts of one chunk."""
    heads = like.shape[0]

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(heads, *shape, dtype=torch.float64, device=like.device)

    return AttentionProfile(
        rows=steps,
        sink_rows=max(query_start + steps - max(query_start, SINK_TOKENS), 0),
        pairs=steps - 1 + has_previous,
        sink_mass=zeros(),
        entropy=zeros(),
        vertical=zeros(),
        diagonal=zeros(),
        column_mass=zeros(keys),
        lag_attention=zeros(lags),
        lag_logits=zeros(lags),
        lag_counts=torch.zeros(lags, dtype=torch.int64),
    )


def _block_shape(group: int, kv_heads: int, keys: int, device: torch.device) -> tuple[int, int]:
    """(KV heads, rows) of a block: about 2 MB of logits on a CPU, 256 MB on a GPU."""
    budget = 2**19 if device.type == "cpu" else 2**26
    return kv_heads, max(16, budget // (group * kv_heads * keys))


def _add_block(
    profile: AttentionProfile,
    group: slice,
    queries: Float[Tensor, "kv group rows dim"],
    keys: Float[Tensor, "kv columns dim"],
    attention: Attention,
    first_row: int,
    first_key: int,
    overlap: int,
) -> None:
    """Add the rows of one block; the first `overlap` (0 or 1) rows count for pairs only."""
    kv, heads, rows, dim = queries.shape
    columns = keys.shape[1]
    logits = attention.logits(queries.reshape(kv, heads * rows, dim), keys.mT)
    logits = logits.view(kv * heads, rows, columns)
    at = torch.arange(first_row, first_row + rows, device=keys.device)
    key_at = torch.arange(first_key, first_key + columns, device=keys.device)
    unsure = 0 if attention.window else first_row - first_key  # all rows see the keys before it
    hidden = ~attention.visible(at, key_at[unsure:])
    logits[..., unsure:].masked_fill_(hidden, torch.finfo(logits.dtype).min)
    weights = logits.softmax(-1)

    fresh = weights[:, overlap:]
    last = first_key + columns
    profile.column_mass[group, first_key:last] += fresh.sum(1)
    past_sink = max(SINK_TOKENS - first_row - overlap, 0)
    sink = fresh[:, past_sink:, : max(SINK_TOKENS - first_key, 0)]
    profile.sink_mass[group] += sink.sum((1, 2))
    seen = attention.visible_keys(at[overlap:]).clamp_min(2).log()
    profile.entropy[group] += (_row_entropy(logits, weights)[:, overlap:] / seen).sum(1)
    profile.vertical[group] += torch.minimum(weights[:, 1:], weights[:, :-1]).sum((1, 2))

    by_lag = _skew(weights)
    shown = min(columns, profile.lag_attention.shape[1])
    profile.lag_attention[group, :shown] += by_lag[:, overlap:].sum(1).flip(-1)[:, :shown]
    profile.diagonal[group] += torch.minimum(by_lag[:, 1:], by_lag[:, :-1]).sum((1, 2))


def _row_entropy(
    logits: Float[Tensor, "heads rows columns"], weights: Float[Tensor, "heads rows columns"]
) -> Float[Tensor, "heads rows"]:
    """`-sum_i p_i log p_i = lse - sum_i p_i a_i`, with lse read off the largest entry of a row."""
    lse = logits.amax(-1) - weights.amax(-1).log()
    return (lse - torch.linalg.vecdot(weights, logits)).clamp_min(0)


def _skew(weights: Float[Tensor, "heads rows columns"]) -> Float[Tensor, "heads rows columns"]:
    """The same block with lags in its columns: `out[h, r, c]` is row r at lag `columns - 1 - c`.

    The last row of the block sees all columns. A view with overlapping strides on a padded copy:
    one step down a row is also one step to the right.
    """
    heads, rows, columns = weights.shape
    padded = torch.nn.functional.pad(weights, (rows - 1, 0))
    width = columns + rows - 1
    return padded.as_strided((heads, rows, columns), (rows * width, width + 1, 1))
