"""Rotary channels: which dimensions turn together, how fast, and how to turn them back."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from tappa.errors import CaptureError

# (cos, sin) -> the vectors of one attention layer, rotated with these tables: (..., tokens, dim)
RotateWith = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class RotaryChannels:
    """The rotary channels of one attention layer, in the order of the model's own frequency table.

    Channel m is the 2-vector `(x[first[m]], x[second[m]])`; at position p RoPE turns it by
    `p * theta[m]` radians, from the first dimension towards the second. Dimensions that are not
    turned (partial rotary, or a layer without RoPE) form one more channel with frequency 0.

    The paper's "channel 124" of a head of 128 dimensions is dimension 124, which is channel 60
    here. A constant attention factor (yarn) is left in the vectors, so that rotations keep norms
    and the logit is `scale * q.k` as in the model.
    """

    first: Int[Tensor, " pairs"]
    second: Int[Tensor, " pairs"]
    theta: Float64[Tensor, " pairs"]
    unrotated: Int[Tensor, " rest"]
    _latest: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def _first(self) -> Tensor | slice:
        return _as_slice(self.first)

    @cached_property
    def _second(self) -> Tensor | slice:
        return _as_slice(self.second)

    @property
    def evenly(self) -> tuple[int, int, int] | None:
        """Where pairs begin and their step, if dimensions `a + i s` and `b + i s` turn together."""
        first, second = self._first, self._second
        if isinstance(first, Tensor) or isinstance(second, Tensor) or first.step != second.step:
            return None
        return first.start, second.start, first.step

    @property
    def slices(self) -> tuple[slice, slice] | None:
        """First and second dimensions of the channels, where they are evenly spaced and all."""
        first, second = self._first, self._second
        if self.evenly is None or len(self.unrotated):
            return None
        return cast(slice, first), cast(slice, second)

    @cached_property
    def turn(self) -> Float[Tensor, "2 pairs"]:
        """Cosine and sine of theta: the turn from one token to the next."""
        return torch.stack([self.theta.cos(), self.theta.sin()]).float()

    @property
    def dim(self) -> int:
        """Head size: two dimensions for each pair, and those that are not rotated."""
        return 2 * len(self.first) + len(self.unrotated)

    @property
    def channels(self) -> int:
        """Number of channels: the rotated pairs, and one for the rest if there is any."""
        return len(self.first) + (len(self.unrotated) > 0)

    @property
    def frequencies(self) -> Float64[Tensor, " channels"]:
        """Angular frequency of every channel in radians per token (0 for the unrotated rest)."""
        rest = self.theta.new_zeros(self.channels - len(self.theta))
        return torch.cat([self.theta, rest])

    def chord(self, shift: int | Int[Tensor, "*batch"]) -> Float[Tensor, "*batch channels"]:
        """`2 |sin(shift * theta / 2)|`: how far `shift` tokens of rotation move a unit vector."""
        by = shift if isinstance(shift, int) else shift.to(self.theta.device)[..., None]
        return (2 * torch.sin(by * self.frequencies / 2).abs()).float()

    def rotate(
        self, x: Float[Tensor, "*batch tokens dim"], positions: Int[Tensor, "*#batch tokens"]
    ) -> Float[Tensor, "*batch tokens dim"]:
        """`R_p x`: turn every channel by `p * theta`; angles are computed in float64."""
        return self._turn(x, *self._angles(positions))

    def unrotate(
        self, x: Float[Tensor, "*batch tokens dim"], positions: Int[Tensor, "*#batch tokens"]
    ) -> Float[Tensor, "*batch tokens dim"]:
        """`R_p^-1 x`: the vectors before RoPE, from the ones after it."""
        return self.turn_back(x, *self.table(positions))

    def turn_back(
        self,
        x: Float[Tensor, "*batch tokens dim"],
        cos: Float[Tensor, "*#batch tokens pairs"],
        sin: Float[Tensor, "*#batch tokens pairs"],
    ) -> Float[Tensor, "*batch tokens dim"]:
        """`unrotate` with the tables of the positions."""
        return self._turn(x, cos, -sin)

    def table(
        self, positions: Int[Tensor, "*batch tokens"]
    ) -> tuple[Float[Tensor, "*batch tokens pairs"], Float[Tensor, "*batch tokens pairs"]]:
        """Cosine and sine of `p * theta`; those of the last positions are remembered."""
        known, tables = self._latest.get("tables", (None, None))
        if known is None or known.device != positions.device or not torch.equal(known, positions):
            tables = self._angles(positions)
            self._latest["tables"] = positions.clone(), tables
        return tables

    def unrotate_from(
        self, x: Float[Tensor, "*batch tokens dim"], start: int
    ) -> Float[Tensor, "*batch tokens dim"]:
        """`unrotate` for consecutive positions from `start` on; a GPU need not be waited for."""
        cos, sin = self.table_from(start, x.shape[-2])
        return self._turn(x, cos, -sin)

    def table_from(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """`table` for consecutive positions, without a word from a GPU: (count, pairs) each."""
        place = start, count
        known, tables = self._latest.get("consecutive", (None, None))
        if known != place:
            tables = self._angles(torch.arange(start, start + count, device=self.theta.device))
            self._latest["consecutive"] = place, tables
        return tables

    def _angles(self, positions: Int[Tensor, "*batch tokens"]) -> tuple[Tensor, Tensor]:
        """Cosine and sine of `p * theta`."""
        angles = positions[..., None].double() * self.theta
        turn = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)
        return turn.real.contiguous(), turn.imag.contiguous()

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x[..., self._first], x[..., self._second]
        out = x.clone() if len(self.unrotated) else torch.empty_like(x)
        for at, one, other in ((self._first, cos, -sin), (self._second, sin, cos)):
            if isinstance(at, slice):
                torch.mul(a, one, out=out[..., at]).addcmul_(b, other)
            else:
                out[..., at] = (a * one).addcmul_(b, other)
        return out

    def forget(self) -> None:
        """Let go of the tables of the last positions, whose size is that of a prompt."""
        self._latest.clear()

    def mean_rotation(self, start: int, count: int) -> Float[Tensor, "dim dim"]:
        """The mean of `R_p` over the positions p from `start` to `start + count - 1`, a matrix."""
        known, matrix = self._latest.get("mean rotation", (None, None))
        if known == (start, count):
            return matrix
        at = torch.arange(start, start + count, device=self.theta.device, dtype=torch.float64)
        mean = torch.polar(torch.ones_like(at)[:, None], at[:, None] * self.theta).mean(0)
        matrix = torch.eye(self.dim, dtype=torch.float64, device=self.theta.device)
        matrix[self.first, self.first] = matrix[self.second, self.second] = mean.real
        matrix[self.first, self.second], matrix[self.second, self.first] = -mean.imag, mean.imag
        self._latest["mean rotation"] = (start, count), matrix.float()
        return matrix.float()

    def pairs(self, x: Float[Tensor, "*batch dim"]) -> Tensor:
        """The rotated channels as complex numbers `x[first] + i x[second]`: (..., pairs)."""
        return torch.complex(x[..., self._first], x[..., self._second])

    def norms(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch channels"]:
        """Euclidean norm of every channel; rotations leave it as it is."""
        return self.by_channel(x.square()).sqrt()

    def by_channel(self, squares: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch channels"]:
        """Add up figures of single dimensions, squares for example, over each channel."""
        rotated = squares[..., self._first] + squares[..., self._second]
        if len(self.unrotated) == 0:
            return rotated
        return torch.cat([rotated, squares[..., self.unrotated].sum(-1, keepdim=True)], dim=-1)

    def spread(self, figures: Float[Tensor, "*batch channels"]) -> Float[Tensor, "*batch dim"]:
        """Give every dimension the figure of its channel."""
        out = figures.new_empty(*figures.shape[:-1], self.dim)
        pairs = len(self.first)
        out[..., self._first] = out[..., self._second] = figures[..., :pairs]
        if len(self.unrotated):
            out[..., self.unrotated] = figures[..., pairs:]
        return out

    def to(self, device: torch.device) -> "RotaryChannels":
        """The same channels with their tables on a device."""
        if self.theta.device == device:
            return self
        return RotaryChannels(
            self.first.to(device),
            self.second.to(device),
            self.theta.to(device),
            self.unrotated.to(device),
        )


@dataclass(frozen=True)
class RotaryLayout:
    """Which pairs a layer turns, and which column of the model's cos/sin tables turns each."""

    first: Int[Tensor, " pairs"]
    second: Int[Tensor, " pairs"]
    column: Int[Tensor, " pairs"]
    unrotated: Int[Tensor, " rest"]

    def same_as(self, other: "RotaryLayout") -> bool:
        """Whether two layers turn the same pairs by the same columns."""
        mine, theirs = vars(self).values(), vars(other).values()
        pairs = list(zip(mine, theirs, strict=True))
        return all(a.device == b.device and torch.equal(a, b) for a, b in pairs)

    def channels(self, column_frequency: Float64[Tensor, " columns"]) -> RotaryChannels:
        """Add the frequency of every column, in radians per token."""
        theta = column_frequency[self.column]
        return RotaryChannels(self.first, self.second, theta, self.unrotated)


def probe_layout(rotate_with: RotateWith, columns: int, tokens: int = 8) -> RotaryLayout:
    """Find a layer's rotary layout by watching what made-up cos and sin tables do to its vectors.

    With `cos = 1, sin = 0` the vectors x come out as they are. With a random cos, dimension i is
    multiplied by the cos column that serves it. With a random sin (and cos = 0), dimension i shows
    `-x_j sin` or `+x_j sin`: its partner j and the sense of rotation. So half-split, interleaved,
    reversed and partial rotary, fused projections and query norms all need no code of their own.
    A dimension that is zero would show nothing: `rotate_with` must turn vectors without zeros.

    Raises:
        CaptureError: the layer is not a rotation of pairs of dimensions by these tables, or a
            dimension is zero.
    """
    generator = torch.Generator().manual_seed(0)
    table = 1 + torch.rand(tokens, columns, generator=generator)
    one, zero = torch.ones_like(table), torch.zeros_like(table)
    x, scaled, swapped = (
        rotate_with(cos, sin).float().cpu().movedim(-2, 0).flatten(1, -2)
        for cos, sin in ((one, zero), (table, zero), (zero, table))
    )
    size = x.abs().amax()
    x, scaled, swapped = x / size, scaled / size, swapped / size
    _check_vectors(x)
    column, rotated = _match_columns(x, scaled, table)
    if not rotated.any() and not torch.equal(scaled, x):
        raise CaptureError("its RoPE is followed by something else, a norm of queries perhaps")
    turned = torch.where(rotated, swapped / table[:, None, column], 0.0)
    partner, sign = _match_partners(x.flatten(0, 1), turned.flatten(0, 1))
    dims = torch.arange(x.shape[-1])
    if not torch.equal(partner[partner[rotated]], dims[rotated]):
        raise CaptureError("its RoPE does not turn pairs of dimensions")
    first = dims[rotated & (sign < 0)]
    order = column[first].argsort(stable=True)
    first = first[order]
    return RotaryLayout(first, partner[first], column[first], dims[~rotated])


def _check_vectors(x: Float[Tensor, "tokens vectors dim"]) -> None:
    """Refuse vectors of which nothing can be learned."""
    if not x.isfinite().all():
        raise CaptureError("its vectors are zero, NaN or infinite whatever goes in")
    hidden = x.eq(0).all(0).all(0)
    if hidden.any():
        at = int(hidden.int().argmax())
        raise CaptureError(f"its dimension {at} is zero whatever goes in: its RoPE cannot be seen")


def _match_columns(
    x: Float[Tensor, "tokens vectors dim"],
    scaled: Float[Tensor, "tokens vectors dim"],
    table: Float[Tensor, "tokens columns"],
) -> tuple[Int[Tensor, " dim"], Bool[Tensor, " dim"]]:
    """For every dimension: the column c with `scaled = table[:, c] * x`, and whether it has one."""
    product, square = (scaled * x).sum(1), (x * x).sum(1)
    norm = (scaled * scaled).sum((0, 1))
    residual = norm[:, None] - 2 * product.T @ table + square.T @ table.square()
    untouched = norm - 2 * product.sum(0) + square.sum(0)
    return residual.argmin(dim=1), residual.amin(dim=1) < untouched


def _match_partners(
    x: Float[Tensor, "vectors dim"], turned: Float[Tensor, "vectors dim"]
) -> tuple[Int[Tensor, " dim"], Float[Tensor, " dim"]]:
    """For every dimension i: the j with `turned_i = +-x_j`, and the sign (0 if it has none)."""
    norm = turned.norm(dim=0)[:, None] * x.norm(dim=0)
    cosine = (turned.T @ x) / norm.clamp_min(torch.finfo(norm.dtype).tiny)
    best, partner = cosine.abs().max(dim=1)
    if (best[turned.abs().amax(dim=0) > 0] < 0.99).any():
        raise CaptureError("its RoPE mixes more than two dimensions")
    return partner, cosine.gather(1, partner[:, None])[:, 0].sign()


def match_frequencies(
    cos: Float[Tensor, "tokens columns"],
    sin: Float[Tensor, "tokens columns"],
    positions: Int[Tensor, " tokens"],
    inv_freqs: list[Tensor],
) -> Float64[Tensor, " columns"]:
    """Angular frequency of every column of a cos/sin table, from the model's `inv_freq` buffers.

    The buffers hold the frequencies exactly, after linear, dynamic, llama3, yarn or longrope
    scaling; the table says which buffer this layer uses (models with a RoPE for each layer type
    have several) and is checked against it, at positions 0..tokens-1 of a prompt.

    Raises:
        CaptureError: no buffer reproduces the table.
    """
    rows = torch.linspace(0, len(positions) - 1, min(len(positions), 16)).long()
    table = torch.complex(cos[rows].double(), sin[rows].double()).cpu()
    table = table / table.abs().clamp_min(1e-9)
    at = positions[rows].double().cpu()
    best, error = torch.empty(0), math.inf
    for inv_freq in inv_freqs:
        theta = inv_freq.detach().double().cpu().flatten()
        for columns in (torch.cat([theta, theta]), theta, theta.repeat_interleave(2)):
            if len(columns) != table.shape[-1]:
                continue
            expected = torch.polar(torch.ones_like(table.real), at[:, None] * columns)
            worst = float((expected - table).abs().max())
            if worst < error:
                best, error = columns, worst
    if error <= 4 * torch.finfo(cos.dtype).eps + 1e-6 * (1 + float(at.max())):
        return best
    raise CaptureError(
        "the model's rotary tables do not follow from any of its inv_freq buffers "
        f"({len(inv_freqs)} found): this form of RoPE is not supported"
    )


def _as_slice(index: Int[Tensor, " n"]) -> Tensor | slice:
    """The same indices as a slice where they are evenly spaced: a view, much faster to take."""
    at = index.tolist()
    if len(at) < 2 or at[1] <= at[0] or at != list(range(at[0], at[-1] + 1, at[1] - at[0])):
        return index
    return slice(at[0], at[-1] + 1, at[1] - at[0])


def period(theta: float) -> float:
    """Tokens for one turn, `2 pi / theta` (infinite for a frequency of 0)."""
    return 2 * math.pi / theta if theta > 0 else math.inf
