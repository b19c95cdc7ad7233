"""Positions of the new tokens of a forward pass, on every device where layers lie."""

import torch
from jaxtyping import Int
from torch import Tensor

from tappa.kernels.unit_queries import Table
from tappa.rope import RotaryChannels


class NewestTokens:
    """Positions, and tables of RoPE at them: made once for all layers of a device."""

    def __init__(self, positions: Int[Tensor, " new"] | None = None) -> None:
        first = torch.empty(0) if positions is None else positions
        self._positions: dict[torch.device, Tensor] = {first.device: first}
        self._tables: dict[int, tuple[RotaryChannels, Table]] = {}

    def __len__(self) -> int:
        return len(next(iter(self._positions.values())))

    def positions(self, device: torch.device) -> Int[Tensor, " new"]:
        """Of all new tokens, on the device of a layer."""
        if device not in self._positions:
            self._positions[device] = next(iter(self._positions.values())).to(device)
        return self._positions[device]

    def table(self, rotary: RotaryChannels, positions: Int[Tensor, " some"]) -> Table:
        """Cosine and sine of positions; only those of all new tokens are kept."""
        device = rotary.theta.device
        if positions is not self._positions.get(device):
            return rotary.table(positions)
        if id(rotary) not in self._tables:
            self._tables[id(rotary)] = rotary, rotary.table(positions)
        return self._tables[id(rotary)][1]
