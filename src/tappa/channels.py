"""Energy and alignment of every RoPE channel of a layer, and the season of its queries and keys."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tappa.kernels.sums import VectorSums
from tappa.rope import RotaryChannels
from tappa.similarity import autocorrelation


@dataclass
class ChannelSums:
    """Per-channel sums of one layer and one prompt, fed in chunks of consecutive steps."""

    rotary: RotaryChannels
    _steps: int = 0
    _sums: dict[str, Tensor] = field(default_factory=dict)

    def add(
        self,
        queries: Float[Tensor, "heads steps dim"],
        keys: Float[Tensor, "kv_heads steps dim"],
    ) -> None:
        """Take in the next steps (vectors before RoPE)."""
        self._steps += queries.shape[1]
        for name, x in (("q", queries), ("k", keys)):
            norms = self.rotary.norms(x).sum(1, dtype=torch.float64)
            self._add(name, norms, x.sum(1, dtype=torch.float64))

    def add_sums(self, queries: VectorSums, keys: VectorSums, steps: int) -> None:
        """`add`, where the sums over these steps are known."""
        self._steps += steps
        for name, sums in (("q", queries), ("k", keys)):
            self._add(name, sums.norms, sums.vectors)

    def _add(self, name: str, norms: Tensor, vectors: Tensor) -> None:
        sums = {f"{name}_norms": norms, f"{name}_vectors": self.rotary.pairs(vectors)}
        for key, value in sums.items():
            self._sums[key] = self._sums[key] + value if key in self._sums else value

    def dominant(self) -> Int[Tensor, " heads"]:
        """The rotated channel of each query head with the most energy `mean|q^m| mean|k^m|` so far

        (0 where none is rotated).
        """
        queries, keys, pairs = self._sums["q_norms"], self._sums["k_norms"], len(self.rotary.theta)
        if pairs == 0:
            return torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
        energy = queries * keys.repeat_interleave(len(queries) // len(keys), 0)
        return energy[:, :pairs].argmax(1)

    def statistics(self) -> dict[str, Tensor]:
        """Figures that add up over prompts, for every query head: sums over the steps of

        `energy` (heads, channels): `mean|q^m| * mean|k^m|`;
        `align` (heads, pairs, 2): `conj(mean q^m) * mean k^m`, a complex number whose angle is
        the mean angle phi from query to key.
        """
        group = len(self._sums["q_norms"]) // len(self._sums["k_norms"])
        norms, vectors = (
            self._sums[f"k_{name}"].repeat_interleave(group, 0) for name in ("norms", "vectors")
        )
        return {
            "energy": self._sums["q_norms"] * norms / self._steps,
            "align": torch.view_as_real(self._sums["q_vectors"].conj() * vectors / self._steps),
        }


def best_season(
    queries: Float[Tensor, "heads steps dim"], keys: Float[Tensor, "kv_heads steps dim"], lags: int
) -> Int[Tensor, " heads"]:
    """The lag L >= 2 at which queries and keys repeat themselves best, up to a third of the steps.

    Largest mean of the two autocorrelations, from unit vectors before RoPE; 0 where the prompt is
    too short to show a season. Source: the L-periodic queries and keys of TAPPA Theorem 5.4.
    """
    heads, steps, _ = queries.shape
    longest = min(steps // 3, lags - 1)
    if longest < 2:
        return torch.zeros(heads, dtype=torch.int64, device=queries.device)
    of_keys = autocorrelation(keys, longest + 1).repeat_interleave(heads // len(keys), 0)
    curves = autocorrelation(queries, longest + 1) + of_keys
    return curves[:, 2:].argmax(dim=1) + 2
