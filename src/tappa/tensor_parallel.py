"""Heads of a model whose layers are split over processes (transformers' tensor parallel).

Each rank holds an equal run of the query heads of every layer, with their KV heads, and sees the
attention of these alone. What is needed of all heads is gathered; all ranks must then ask for it
together, which they do, since they run the same layers at the same time.
"""

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from tappa.errors import ModelError


@dataclass(frozen=True)
class HeadShards:
    """This rank's heads among those of all ranks; one rank holds them all."""

    rank: int = 0
    ranks: int = 1
    group: Any = None
    device: str = "cpu"  # what the ranks exchange lies here

    @classmethod
    def of(cls, model: PreTrainedModel) -> "HeadShards":
        """How a model is split."""
        if (getattr(model, "_tp_size", None) or 1) == 1:
            return cls()
        mesh: Any = model._device_mesh
        if "tp" in (mesh.mesh_dim_names or ()):
            mesh = mesh["tp"]
        return cls(mesh.get_local_rank(), mesh.size(), mesh.get_group(), mesh.device_type)

    def gather(self, mine: Tensor, dim: int = 0) -> Tensor:
        """(heads of this rank, ...) -> (heads of all ranks, ...); `dim` is that of the heads."""
        if self.ranks == 1:
            return mine
        if mine.dtype == torch.bool:
            return self.gather(mine.to(torch.uint8), dim).bool()
        sent = mine.movedim(dim, 0).to(self.device).contiguous()
        parts = [torch.empty_like(sent) for _ in range(self.ranks)]
        dist.all_gather(parts, sent, group=self.group)
        return torch.cat(parts).movedim(0, dim).to(mine.device)

    def gather_padded(self, mine: Tensor, value: float | bool) -> Tensor:
        """`gather` of (heads, ..., tokens) where ranks differ in tokens, filled up with `value`."""
        if self.ranks == 1:
            return mine
        tokens = mine.shape[-1]
        longest = int(self.gather(torch.tensor([tokens])).max())
        return self.gather(torch.nn.functional.pad(mine, (0, longest - tokens), value=value))

    def total(self, mine: int | float) -> float:
        """The sum over all ranks."""
        if self.ranks == 1:
            return float(mine)
        return float(self.gather(torch.tensor([mine], dtype=torch.float64)).sum())

    def mine(self, every: Any, dim: int = 0) -> Any:
        """This rank's part of a list with all heads, or of a tensor that has them as `dim`."""
        if isinstance(every, Tensor):
            return every.chunk(self.ranks, dim)[self.rank]
        size = len(every) // self.ranks
        return every[self.rank * size : (self.rank + 1) * size]

    def of_first(self, mine: Tensor) -> Tensor:
        """The tensor of the first rank, whatever the others have."""
        if self.ranks == 1:
            return mine
        sent = mine.to(self.device, copy=True)
        dist.broadcast(sent, group=self.group, group_src=0)
        return sent.to(mine.device)


def rank_of_torchrun() -> int | None:
    """The number of this process among those of torchrun; None without it, or where it is alone."""
    if not dist.is_available() or not dist.is_torchelastic_launched():
        return None
    return int(os.environ["RANK"]) if int(os.environ["WORLD_SIZE"]) > 1 else None


def leave_torchrun() -> None:
    """Let go of the other processes, where there are any: all must be done."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def require_whole(model: PreTrainedModel, what: str) -> None:
    """Raise ModelError for a model whose heads are split, where that will not do."""
    ranks = HeadShards.of(model).ranks
    if ranks > 1:
        raise ModelError(f"expected a whole model to {what}, its heads are split over {ranks}")


def whole(weight: Tensor) -> Tensor:
    """A split weight put together; any other as it is. All ranks must ask for it."""
    found: Tensor = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    return found


def local(weight: Tensor) -> Tensor:
    """The part of a split weight that this rank holds; any other weight as it is."""
    found: Tensor = weight.to_local() if hasattr(weight, "to_local") else weight
    return found
