"""Self-similarity of queries or keys over time, accumulated in O(dim) memory."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor
from torch.nn.functional import normalize

from tappa import kernels
from tappa.fetching import send
from tappa.kernels.sums import VectorSums

Space = Literal["pre", "post"]
Pairs = Literal["all", "adjacent"]
Extent = Literal["prompt", "window"]


class Variant(NamedTuple):
    """One way to measure self-similarity: before or after RoPE, which pairs, which steps."""

    space: Space = "pre"
    pairs: Pairs = "all"
    extent: Extent = "prompt"

    def __str__(self) -> str:
        return "_".join(self)


SPACES: tuple[Space, ...] = ("pre", "post")
PAIRS: tuple[Pairs, ...] = ("all", "adjacent")
EXTENTS: tuple[Extent, ...] = ("prompt", "window")
VARIANTS = tuple(Variant(s, p, e) for s in SPACES for p in PAIRS for e in EXTENTS)
DEFAULT = Variant()
PAPER_KV_CACHE = Variant("post", "all", "window")  # with window = 32
PAPER_PRUNING = Variant("pre", "all", "prompt")
PRESETS = {"default": DEFAULT, "paper-kv-cache": PAPER_KV_CACHE, "paper-pruning": PAPER_PRUNING}


def self_similarity(x: Float[Tensor, "*batch tokens dim"]) -> Float64[Tensor, "*batch"]:
    """Mean cosine over all pairs of different steps, `S = (|sum_t x_t/|x_t||^2 - T) / (T (T-1))`.

    O(T d) time; no T x T matrix. S is 1 when all vectors point the same way, about 0 when they
    are independent, and never below `-1 / (T - 1)`. NaN for fewer than two steps. A zero vector
    counts as orthogonal to everything, itself included.

    Source: TAPPA (arXiv 2601.21709), q-similarity.

    >>> self_similarity(torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]]))  # cosines 0, 1, 0
    tensor(0.3333, dtype=torch.float64)
    """
    total, squares = x.new_zeros((), dtype=torch.float64), x.new_zeros((), dtype=torch.float64)
    for chunk in x.split(128, dim=-2):  # so that the normalised copy stays small
        unit = normalize(chunk, dim=-1)
        total = total + unit.sum(-2, dtype=torch.float64)
        squares = squares + unit.square().sum((-1, -2), dtype=torch.float64)
    cosines, pairs = _all_pairs(total, squares, x.shape[-2])
    return cosines / pairs if pairs else torch.full_like(cosines, torch.nan)


def _all_pairs(total: Tensor, squares: Tensor, steps: int) -> tuple[Tensor, int]:
    """(sum of cosines, number) of ordered pairs of different steps, from sums of unit vectors."""
    return total.square().sum(-1) - squares, steps * (steps - 1)


def _sum_of_steps(unit: Tensor) -> Tensor:
    """In float64, by sums of 128 steps in the type at hand: several times faster on CPU."""
    if unit.device.type != "cpu":
        return unit.sum(-2, dtype=torch.float64)
    parts = [part.sum(-2) for part in unit.split(128, dim=-2)]
    return torch.stack(parts).sum(0, dtype=torch.float64)


def _adjacent(unit: Tensor) -> tuple[Tensor, int]:
    """(sum of cosines, number) of pairs of neighbouring steps."""
    cosines = torch.linalg.vecdot(unit[..., 1:, :], unit[..., :-1, :])
    return cosines.sum(-1, dtype=torch.float64), max(unit.shape[-2] - 1, 0)


@dataclass
class UnitSums:
    """Sums of the unit vectors of one prompt so far, in one space: O(window * dim) memory."""

    total: Tensor | None = None
    squares: Tensor | None = None
    steps: int = 0
    adjacent: Tensor | float = 0.0
    tail: Tensor | None = None  # the last `window` unit vectors

    def add(
        self, unit: Float[Tensor, "heads tokens dim"], window: int, adjacent: bool = True
    ) -> None:
        """Accumulate the next steps of the prompt, as vectors of length 1.

        Without `adjacent` the sums over neighbours come out as NaN, and cost nothing.
        """
        squares = torch.linalg.vecdot(unit, unit).sum(-1, dtype=torch.float64)
        cosines = _adjacent(unit)[0] if adjacent else None
        self.add_sums(_sum_of_steps(unit), squares, cosines, unit, window, unit.shape[-2])

    def add_sums(
        self,
        total: Float64[Tensor, "heads dim"],
        squares: Float64[Tensor, " heads"],
        adjacent: Float64[Tensor, " heads"] | None,
        unit: Float[Tensor, "heads ends dim"],
        window: int,
        steps: int,
    ) -> None:
        """`add`, from sums over the next steps; `unit` has at least their first and last ones."""
        tail = self.tail
        if adjacent is None:
            self.adjacent = torch.nan
        else:
            self.adjacent = self.adjacent + adjacent
            if tail is not None:
                border = torch.cat([tail[..., -1:, :], unit[..., :1, :]], dim=-2)
                self.adjacent = self.adjacent + _adjacent(border)[0]
        self.total = total if self.total is None else self.total + total
        self.squares = squares if self.squares is None else self.squares + squares
        self.steps += steps
        last = unit[..., -max(window, 1) :, :]
        joined = last if tail is None else torch.cat([tail, last], dim=-2)
        self.tail = joined[..., -max(window, 1) :, :].clone()

    def sums(self, window: int) -> Iterator[tuple[Pairs, Extent, Tensor, int]]:
        """For each choice of pairs and extent: sum of cosines of every head, number of pairs."""
        if self.total is None or self.squares is None or self.tail is None:
            return
        yield "all", "prompt", *_all_pairs(self.total, self.squares, self.steps)
        yield "adjacent", "prompt", torch.as_tensor(self.adjacent), max(self.steps - 1, 0)
        last = self.tail[..., -window:, :]
        squares = last.square().sum((-1, -2), dtype=torch.float64)
        yield (
            "all",
            "window",
            *_all_pairs(last.sum(-2, dtype=torch.float64), squares, last.shape[-2]),
        )
        yield "adjacent", "window", *_adjacent(last)


@dataclass
class SelfSimilarity:
    """Every variant of self-similarity of one prompt, fed in chunks of consecutive steps.

    `add` takes the vectors of one chunk before and after RoPE (heads, tokens, dim); `sums` gives,
    for each variant, the sum of cosines of every head and the number of pairs: figures that add up
    over prompts, so that means over any set of prompts come out exactly.
    """

    window: int = 32
    _streams: dict[Space, UnitSums] = field(
        default_factory=lambda: {"pre": UnitSums(), "post": UnitSums()}
    )

    def add(
        self, pre: Float[Tensor, "heads tokens dim"], post: Float[Tensor, "heads tokens dim"]
    ) -> None:
        """Accumulate the next steps of the prompt."""
        self._streams["pre"].add(normalize(pre, dim=-1), self.window)
        self._streams["post"].add(normalize(post, dim=-1), self.window)

    def add_sums(
        self,
        sums: VectorSums,
        pre: Float[Tensor, "heads ends dim"],
        post: Float[Tensor, "heads ends dim"],
        steps: int,
    ) -> None:
        """`add`, where the sums over these steps are known: of the vectors, `ends` are enough."""
        spaces: tuple[tuple[Space, Tensor, Tensor, Tensor], ...] = (
            ("pre", pre, sums.pre, sums.adjacent_pre),
            ("post", post, sums.post, sums.adjacent_post),
        )
        for space, x, total, adjacent in spaces:
            unit = normalize(x, dim=-1)
            stream = self._streams[space]
            stream.add_sums(total, sums.squares, adjacent, unit, self.window, steps)

    def ends(self, steps: int, device: torch.device) -> Int64[Tensor, " ends"]:
        """Which of so many steps `add_sums` looks at: the first and the last ones."""
        every = torch.arange(steps, device=device)
        return every if steps <= self.window else torch.cat([every[:1], every[-self.window :]])

    def sums(self) -> dict[Variant, tuple[Tensor, int]]:
        """For each variant (sum of cosines per head, number of pairs) of the steps so far."""
        return {
            Variant(space, pairs, extent): (cosines, count)
            for space, stream in self._streams.items()
            for pairs, extent, cosines, count in stream.sums(self.window)
        }


def autocorrelation(
    unit: Float[Tensor, "heads tokens dim"], lags: int
) -> Float[Tensor, "heads lags"]:
    """Mean cosine of steps L apart, `C(L) = mean_t u_t . u_(t+L)`, L < lags, from unit vectors.

    By FFT along the tokens: O(T log T d) time; on a GPU from the band of products, O(T lags d).
    NaN where no two steps are L apart.
    Source: the L-periodicity of queries and keys in Theorem 5.4.
    """
    steps = unit.shape[-2]
    counts = send(lag_counts(steps, steps, lags).float(), unit.device)
    sums = kernels.autocorrelation_sums(unit, lags)
    if sums is None:  # few heads at a time: the FFT keeps (2 steps, dim) numbers for each
        sums = torch.cat([lag_sums(part, part, lags) for part in unit.float().split(4)])
    return sums / counts


def lag_sums(
    later: Float[Tensor, "heads steps dim"],
    earlier: Float[Tensor, "#heads past dim"],
    lags: int,
    start: int = 0,
) -> Float[Tensor, "heads lags"]:
    """Sum over t of `later_t . earlier_(start + t - lag)` for every lag below `lags`, by FFT.

    `start` is the index in `earlier` of the step that `later_0` stands for.
    """
    steps, past = later.shape[-2], earlier.shape[-2]
    size = 1 << (steps + past - 1).bit_length()  # no wrap-around, and a length that is fast
    a = torch.fft.rfft(later.transpose(-1, -2), n=size)
    b = a if earlier is later else torch.fft.rfft(earlier.transpose(-1, -2), n=size)
    cross = torch.fft.irfft((a * b.conj()).sum(-2), n=size)  # [j] = sum_s later_(s+j) . earlier_s
    lag = torch.arange(lags, device=later.device)
    return cross[..., (lag - start) % size] * (lag < start + steps)


def lag_counts(steps: int, past: int, lags: int, start: int = 0) -> Int64[Tensor, " lags"]:
    """How many terms each sum of `lag_sums` has: steps t with `0 <= start + t - lag < past`."""
    lag = torch.arange(lags)
    first = (lag - start).clamp_min(0)
    last = (past - 1 - start + lag).clamp_max(steps - 1)
    return (last - first + 1).clamp_min(0)
