"""A model that has no memory for more than some rows at once."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def out_of_memory() -> Exception:
    """What CUDA raises."""
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")


@contextmanager
def short_of_memory(model: nn.Module, rows: int, error: Exception | None = None) -> Iterator[None]:
    """Forward passes of more rows raise `error`, by default what CUDA raises."""

    def refuse(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs["input_ids"]
        if len(ids) > rows:
            raise error or out_of_memory()

    handle = model.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
