"""Tensors on their way between the CPU and a GPU, neither of which waits for the other."""

import torch
from torch import Tensor


class Fetched:
    """A copy of a tensor on the CPU, as of now. `get` waits for it, and for nothing later."""

    def __init__(self, x: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if not x.is_cuda:
            self._copy = x.cpu()
            return
        pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        self._copy = pinned.copy_(x, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(x.device))

    def get(self) -> Tensor:
        """The copy, once it is there."""
        if self._event is not None:
            self._event.synchronize()
        return self._copy


def send(x: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; what comes from the CPU to a GPU is not waited for.

    It goes from pinned memory, which is not used again before the copy is done. From other memory
    a copy may still be under way when that is.
    """
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
