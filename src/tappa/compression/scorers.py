"""Scores of the tokens that a layer holds: higher is kept. A scorer never sees the budget."""

import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import avg_pool1d

from tappa.attention_profile import Attention
from tappa.compression.options import check_range
from tappa.errors import CompressionError
from tappa.kernels.launching import choose
from tappa.kernels.window_attention import Segments, WindowSums, window_sums_triton
from tappa.rope import RotaryChannels

Need = Literal["window", "received", "moments", "call"]
Scores = Float[Tensor, "kv_heads tokens"]


@dataclass(frozen=True)
class Moments:
    """Sums over the queries of a prompt before RoPE, without its first tokens."""

    count: int
    total: Float[Tensor, "heads dim"]
    outer: Float[Tensor, "heads dim dim"]


@dataclass(frozen=True)
class TokenView:
    """The tokens that one layer holds of one prompt, and what is known of its queries.

    Where heads hold different numbers of tokens, the shorter are padded: position -1.
    """

    keys: Float[Tensor, "kv_heads tokens dim"]  # post-RoPE
    values: Float[Tensor, "kv_heads tokens value_dim"]
    positions: Int[Tensor, "kv_heads tokens"]
    seen: int  # position of the next token
    attention: Attention
    window: Float[Tensor, "heads window dim"]  # last queries, post-RoPE
    window_positions: Int[Tensor, " window"]
    rotary: RotaryChannels | None = None
    received: Float[Tensor, "kv_heads tokens"] | None = None
    moments: Moments | None = None
    first: int = 0  # position of the prompt's first token
    module: nn.Module | None = None
    call: inspect.BoundArguments | None = None  # what the attention module was called with

    @property
    def present(self) -> Bool[Tensor, "kv_heads tokens"]:
        """Where there is a token and no padding."""
        return self.positions >= 0

    @property
    def earlier(self) -> Bool[Tensor, "kv_heads tokens"]:
        """Tokens before the window."""
        return self.present & (self.positions < self.window_positions.min())

    @cached_property
    def weights(self) -> Float[Tensor, "heads window tokens"]:
        """Attention of the window's queries on the tokens held."""
        return attention_on(self, self.window, self.window_positions)

    @cached_property
    def window_sums(self) -> "WindowSums | FromWeights":
        """Mean and variance of that attention for every token, and its entropy."""
        return choose("window_sums", self.keys, self._sums_by_kernel, lambda: FromWeights(self))

    def _sums_by_kernel(self) -> WindowSums:
        kv_heads, held, dim = self.keys.shape
        starts = torch.arange(0, kv_heads * held, held, device=self.keys.device)
        lengths = torch.full_like(starts, held)  # padding has no position
        keys, positions = self.keys.reshape(-1, dim), self.positions.reshape(-1)
        where = Segments(keys, positions, starts, lengths, held)
        queries = self.window.view(kv_heads, -1, *self.window.shape[1:])
        attention = self.attention
        return window_sums_triton(
            where, queries, self.window_positions, attention.scale, attention.softcap
        )

    def mean_over_group(self, x: Float[Tensor, "heads tokens"]) -> Scores:
        """Mean over the query heads of each KV head."""
        return x.view(len(self.keys), -1, x.shape[-1]).mean(1)


class FromWeights:
    """`WindowSums` from the weights themselves, each when it is asked for."""

    def __init__(self, tokens: TokenView) -> None:
        self.tokens: TokenView = weakref.proxy(tokens)  # they hold this: a circle would keep caches

    @cached_property
    def mean(self) -> Scores:
        """Over the window's queries and the group."""
        return self.tokens.mean_over_group(self.tokens.weights.mean(1))

    @cached_property
    def variance(self) -> Scores:
        """Over the window's queries, mean over the group."""
        return self.tokens.mean_over_group(variance_over_window(self.tokens.weights))

    @cached_property
    def entropy(self) -> Float[Tensor, " kv_heads"]:
        """Over the tokens before the window, summed over queries and group."""
        weights = self.tokens.weights
        kv_heads = len(self.tokens.keys)
        earlier = self.tokens.earlier.repeat_interleave(len(weights) // kv_heads, 0)
        return entropy_over_tokens(weights * earlier[:, None]).view(kv_heads, -1).sum(1)


Score = Callable[[TokenView], Scores]


@dataclass(frozen=True)
class Scorer:
    """A score, and what it needs the cache to remember of queries."""

    score: Score
    needs: frozenset[Need] = frozenset()


def attention_on(
    tokens: TokenView, queries: Float[Tensor, "heads new dim"], positions: Int[Tensor, " new"]
) -> Float[Tensor, "heads new tokens"]:
    """Attention of some queries on the tokens held, in float32, by position."""
    kv_heads, held, dim = tokens.keys.shape
    grouped = queries.float().reshape(kv_heads, -1, dim)
    logits = tokens.attention.logits(grouped, tokens.keys.float().mT)
    logits = logits.view(kv_heads, -1, len(positions), held)
    hidden = (tokens.positions[:, None] > positions[:, None]) | ~tokens.present[:, None]
    logits = logits.masked_fill(hidden[:, None], torch.finfo(logits.dtype).min)
    return logits.softmax(-1).flatten(0, 1)


def variance_over_window(
    weights: Float[Tensor, "heads window tokens"],
) -> Float[Tensor, "heads tokens"]:
    """Sample variance over the window's queries (0 for a single one), faster than `Tensor.var`."""
    rest = weights - weights.mean(1, keepdim=True)
    return rest.square_().sum(1) / max(weights.shape[1] - 1, 1)


def entropy_over_tokens(
    weights: Float[Tensor, "heads window tokens"],
) -> Float[Tensor, "heads window"]:
    """`-sum w log w` of every query, faster than `torch.special.entr`."""
    return -(weights.clamp_min(torch.finfo(weights.dtype).tiny).log() * weights).sum(2)


def received_by(
    tokens: TokenView, queries: Float[Tensor, "heads new dim"], positions: Int[Tensor, " new"]
) -> Scores:
    """Attention that each token receives from some queries, mean over the heads of its group.

    In blocks of queries, on the keys that each may see: O(tokens) memory.
    """
    size = 2**22 if queries.device.type == "cpu" else 2**26  # numbers of a block of attention
    block = max(16, size // (len(queries) * tokens.keys.shape[1]))
    total = torch.zeros(tokens.positions.shape, device=queries.device)
    parts = list(zip(queries.split(block, 1), positions.split(block), strict=True))
    ends = torch.stack([at[-1] for _, at in parts]).expand(len(total), -1).contiguous()
    last = torch.iinfo(tokens.positions.dtype).max
    held = tokens.positions.masked_fill(~tokens.present, last)  # positions ascend, padding is last
    pasts = torch.searchsorted(held.to(ends), ends, right=True).amax(0).tolist()
    for (part, at), past in zip(parts, pasts, strict=True):
        names = ("keys", "values", "positions")
        seen = replace(tokens, received=None, **{x: getattr(tokens, x)[:, :past] for x in names})
        total[:, :past] += seen.mean_over_group(attention_on(seen, part, at).sum(1))
    return total


def recency() -> Scorer:
    """The later the better. Source: StreamingLLM (arXiv 2309.17453); its sinks are protected."""
    return Scorer(lambda tokens: tokens.positions.float())


def received() -> Scorer:
    """Attention received from all queries so far. Source: H2O (arXiv 2306.14048)."""

    def score(tokens: TokenView) -> Scores:
        assert tokens.received is not None
        return tokens.received

    return Scorer(score, frozenset({"received"}))


def window_mean(kernel: int = 5) -> Scorer:
    """Mean attention of the last queries, pooled. Source: SnapKV (arXiv 2404.14469)."""
    return window_mean_var(0.0, kernel)


def window_mean_var(gamma: float = 200.0, kernel: int = 5) -> Scorer:
    """Mean + gamma variance of the last queries' attention, pooled. Source: CAKE (2503.12491).

    Mean over the query heads of a KV head, then over `kernel` neighbours.
    """
    check_range("gamma", gamma, 0)
    check_range("kernel", kernel, 1)
    if kernel % 2 == 0:
        raise CompressionError(f"expected an odd kernel of at least 1, got {kernel!r}")

    def score(tokens: TokenView) -> Scores:
        sums = tokens.window_sums
        figure = sums.mean + gamma * sums.variance if gamma else sums.mean
        scores = (figure * tokens.earlier)[:, None]
        return avg_pool1d(scores, kernel, stride=1, padding=kernel // 2)[:, 0]

    return Scorer(score, _WINDOW)


def expected_attention(future: int = 512, value_norm: bool = True) -> Scorer:
    """Attention expected from queries at the next `future` positions, times the value's norm.

    Queries before RoPE are taken as Gaussian with the prompt's mean and covariance, and turned by
    the mean rotation R of those positions: `softmax(s k.R mu + s^2/2 k.R C R^T k) |v|`, s the
    softmax scale. Source: Expected Attention (arXiv 2510.00636).
    """
    check_range("future", future, 1)

    def score(tokens: TokenView) -> Scores:
        moments, rotary = tokens.moments, tokens.rotary
        assert moments is not None
        assert rotary is not None
        count = max(moments.count, 1)  # without any query, mean and covariance are 0
        mean = moments.total / count
        covariance = moments.outer / count - mean[:, :, None] * mean[:, None]
        turn = rotary.mean_rotation(tokens.seen, future).to(mean)
        mean, covariance = mean @ turn.T, turn @ covariance @ turn.T
        kv_heads, _, dim = tokens.keys.shape
        keys = tokens.keys.float()[:, None]
        scale = tokens.attention.scale
        linear = torch.matmul(keys, mean.view(kv_heads, -1, dim, 1))[..., 0]
        products = torch.matmul(keys, covariance.view(kv_heads, -1, dim, dim))
        logits = scale * linear + scale**2 / 2 * torch.linalg.vecdot(products, keys)
        hidden = ~tokens.present | (tokens.positions < tokens.first + SKIPPED)
        logits = logits.masked_fill(hidden[:, None], torch.finfo(logits.dtype).min)
        weights = logits.softmax(-1).mean(1)
        return weights * tokens.values.float().norm(dim=-1) if value_norm else weights

    return Scorer(score, frozenset({"moments"}))


def mixed(share: float, now: Scorer, future: int = 512) -> Scorer:
    """The last queries' attention, with a share of each head's mass as future ones would pay it.

    `(1 - share) w + share (sum w) e / (sum e)`, w the scores `now` and e those of
    `expected_attention`, sums over the tokens of a head.
    """
    check_range("expected_share", share, 0, 1)
    later = expected_attention(future)
    if share == 0:
        return now

    def score(tokens: TokenView) -> Scores:
        seen, expected = now.score(tokens), later.score(tokens) * tokens.earlier
        mass = seen.sum(1, keepdim=True)
        total = expected.sum(1, keepdim=True).clamp_min(torch.finfo(expected.dtype).tiny)
        return (1 - share) * seen + share * mass * expected / total

    return Scorer(score, now.needs | later.needs)


SKIPPED = 4  # first tokens of a prompt that the moments leave out: their queries are outliers
_WINDOW: frozenset[Need] = frozenset({"window"})
