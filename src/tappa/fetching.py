"""Figures on their way from a GPU to the CPU, which works on meanwhile."""

import torch
from torch import Tensor


class Fetched:
    """A copy of a tensor on the CPU, as of now. `get` waits for it, and for nothing later."""

    def __init__(self, x: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._copy = x
        if x.is_cuda:
            pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            self._copy = pinned.copy_(x, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(x.device))

    def get(self) -> Tensor:
        """The copy, once it is there."""
        if self._event is not None:
            self._event.synchronize()
        return self._copy
