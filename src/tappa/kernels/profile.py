"""The sums of an attention profile by Triton kernels: the T x T matrix never leaves a tile.

Pass 1 (rows.py) gives the log-sum-exp and the entropy of every row. Pass 2 (weights.py) computes
the logits again and sums what needs finished weights. Sums over lags have their own (bands.py).
"""

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from tappa.kernels.bands import bands_kernel
from tappa.kernels.rows import rows_kernel
from tappa.kernels.weights import weights_kernel

LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class Tiles:
    """Sizes of the tiles of one kernel, warps for each, and how many loads are in flight."""

    queries: int
    keys: int
    parts: int = 1  # in how many parts pass 2 cuts the tile of its queries
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True)
class Tiling:
    """How the three kernels run: what was fastest on an H100 (runs/LOG.md)."""

    rows: Tiles = Tiles(128, 128, stages=2)
    weights: Tiles = Tiles(128, 64, parts=16)
    bands: Tiles = Tiles(64, 64)

    @classmethod
    def of(cls, queries: Tensor) -> "Tiling":
        """For a type and a head size: what fits into the shared memory of a processor."""
        row_bytes = queries.element_size() * triton.next_power_of_2(queries.shape[-1])
        if row_bytes <= 256:
            return cls()
        tiles = Tiles(64, 64, stages=2 if row_bytes <= 512 else 1)
        return cls(tiles, replace(tiles, parts=8), tiles)


@dataclass(frozen=True)
class Chunk:
    """Queries (heads, rows, dim) and keys (kv_heads, past, dim) of one chunk, and how they attend.

    With `has_previous` the first row is that of the step before the chunk.
    """

    queries: Tensor
    keys: Tensor
    scale: float
    window: int | None = None
    softcap: float | None = None
    query_start: int = 0
    key_start: int = 0
    has_previous: bool = False
    tiling: Tiling | None = None

    def new(self, *shape: int, zero: bool = False) -> Tensor:
        """A buffer with heads first."""
        make = torch.zeros if zero else torch.empty
        return make(len(self.queries), *shape, dtype=torch.float32, device=self.queries.device)

    @property
    def tiles(self) -> Tiling:
        return self.tiling or Tiling.of(self.queries)

    def grid(self, *programs: int) -> tuple[int, ...]:
        return (*programs, len(self.queries))

    @property
    def scales(self) -> tuple[float, float]:
        """Scale and cap with the logarithm's base folded in."""
        if self.softcap is None:
            return self.scale * LOG2E, 1.0
        # cap * tanh(x / cap) = cap * (1 - 2 / (1 + e^(2 x / cap)))
        return 2 * self.scale / self.softcap * LOG2E, self.softcap * LOG2E

    @property
    def places(self) -> tuple[int, ...]:
        """Number of rows, first fresh row, position of row 0, number of keys, position of key 0."""
        fresh = int(self.has_previous)
        rows, past = self.queries.shape[1], self.keys.shape[1]
        return rows, fresh, self.query_start - fresh, past, self.key_start

    @property
    def strides(self) -> tuple[int, ...]:
        """Of heads and rows of the queries, of the keys, and of the heads of the log-sum-exp."""
        return *self.queries.stride()[:2], *self.keys.stride()[:2], self.queries.shape[1]

    def constants(self, tiles: Tiles) -> dict[str, object]:
        """What kernels are compiled for."""
        dim = self.queries.shape[-1]
        return {
            "GROUP": len(self.queries) // len(self.keys),
            "DIM": dim,
            "BLOCK_DIM": max(16, triton.next_power_of_2(dim)),
            "WINDOW": self.window is not None,
            "SOFTCAP": self.softcap is not None,
            "PRECISION": "tf32x3" if self.queries.dtype == torch.float32 else "ieee",
            "STAGES": tiles.stages,
            "num_warps": tiles.warps,
        }


def row_sums(chunk: Chunk, sink_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pass 1: log-sum-exp in units of log 2 (heads, rows); entropy, sink mass (heads, programs)."""
    tiles, rows = chunk.tiles.rows, chunk.queries.shape[1]
    programs = triton.cdiv(rows, tiles.queries)
    lse, entropy, sink = chunk.new(rows), chunk.new(programs), chunk.new(programs)
    rows_kernel[chunk.grid(programs)](
        *(chunk.queries, chunk.keys, lse, entropy, sink, *chunk.scales, chunk.window or 0),
        *(*chunk.places, *chunk.strides),
        **chunk.constants(tiles),
        SINK=sink_tokens,
        ROWS=tiles.queries,
        KEYS=tiles.keys,
    )
    return lse, entropy, sink


def weight_sums(chunk: Chunk, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pass 2: column mass (heads, past), vertical and diagonal persistence (heads, programs)."""
    tiles = chunk.tiles.weights
    rows, fresh, _, past, _ = chunk.places
    programs = triton.cdiv(rows - fresh, tiles.queries // tiles.parts * (tiles.parts - 1))
    vertical, diagonal = chunk.new(programs), chunk.new(programs)
    column_mass = chunk.new(past, zero=True)
    weights_kernel[chunk.grid(programs)](
        *(chunk.queries, chunk.keys, lse, column_mass, vertical, diagonal, *chunk.scales),
        *(chunk.window or 0, *chunk.places, *chunk.strides, past),
        **chunk.constants(tiles),
        QUERIES=tiles.queries,
        PARTS=tiles.parts,
        KEYS=tiles.keys,
    )
    return column_mass, vertical, diagonal


def band_sums(chunk: Chunk, lse: Tensor | None, lags: int) -> tuple[Tensor, Tensor]:
    """Weights (0 without `lse`) and `q.k` at every distance below `lags`, summed: (heads, lags)."""
    tiles = chunk.tiles.bands
    rows, fresh, *_ = chunk.places
    bands = triton.cdiv(min(lags, chunk.window or lags) - 1 + tiles.queries, tiles.keys)
    splits = max(1, min(16, (rows - fresh) // (8 * tiles.queries)))
    attention, products = chunk.new(lags, zero=True), chunk.new(lags, zero=True)
    bands_kernel[chunk.grid(bands, splits)](
        *(chunk.queries, chunk.keys, attention if lse is None else lse, attention, products),
        *(*chunk.scales, chunk.window or 0, lags, *chunk.places, *chunk.strides),
        **chunk.constants(tiles),
        ROWS=tiles.queries,
        KEYS=tiles.keys,
        ATTENTION=lse is not None,
    )
    return attention, products


def profile_sums(chunk: Chunk, lags: int, sink_tokens: int) -> dict[str, Tensor]:
    """The sums of an AttentionProfile of one chunk: (heads, ...) in float64."""
    if chunk.queries.device.type == "cpu" and chunk.queries.dtype == torch.bfloat16:
        # Triton's interpreter multiplies bfloat16 as if it were whole numbers
        chunk = replace(chunk, queries=chunk.queries.float(), keys=chunk.keys.float())
    lse, entropy, sink = row_sums(chunk, sink_tokens)
    column_mass, vertical, diagonal = weight_sums(chunk, lse)
    lag_attention, lag_products = band_sums(chunk, lse, lags)
    return {
        "sink_mass": sink.sum(1, dtype=torch.float64),
        "entropy": entropy.sum(1, dtype=torch.float64),
        "vertical": vertical.sum(1, dtype=torch.float64),
        "diagonal": diagonal.sum(1, dtype=torch.float64),
        "column_mass": torch.nn.functional.pad(column_mass.double(), (chunk.key_start, 0)),
        "lag_attention": lag_attention.double(),
        "lag_logits": chunk.scale * lag_products.double(),
    }
