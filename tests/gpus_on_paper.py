"""GPUs for tests on a machine without any: CPU tensors that say they lie on one.

As on real GPUs, an operation on tensors of two devices is refused, and what is copied to the CPU
without waiting is there only after an event of the right GPU was waited for.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map_only
from transformers import PreTrainedModel

CPU = torch.device("cpu")
GARBAGE = -77  # what a pinned buffer holds before the copy is there
BY_INDEX = (Tensor.__getitem__, Tensor.__setitem__)  # which take an index on the CPU


class GPUsOnPaper(TorchFunctionMode):
    """Keeps the device of every tensor, and what is under way between them."""

    def __init__(self) -> None:
        super().__init__()
        self.under_way: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
        self.operations = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch for all that it does."""
        kwargs = dict(kwargs or {})
        if func in _PROPERTIES:
            return _PROPERTIES[func](place_of(args[0]))
        if func in (Tensor.to, Tensor.cpu):
            return self._moved(func, *args, **kwargs)
        if func == Tensor.copy_:
            return self._copied(*args, **kwargs)
        if func == Tensor.pin_memory:
            return _mark(args[0].clone(), CPU, pinned=True)
        if func in (Tensor.numpy, Tensor.__array__) and place_of(args[0]) != CPU:
            raise TypeError("can't convert a CUDA tensor to numpy")
        self.operations += 1
        asked, pinned = kwargs.pop("device", None), kwargs.pop("pin_memory", False)
        place = self._one_place(func, args, kwargs)
        out = func(*args, **kwargs)
        if isinstance(out, Iterator):  # of rows
            out = list(out)
        where = place if asked is None else torch.device(asked)
        return tree_map_only(Tensor, lambda x: _mark(x, where, pinned), out)

    def _one_place(self, func: Any, args: Any, kwargs: dict[str, Any]) -> torch.device:
        """Where all tensors of a call lie. Numbers may come from the CPU, and so may an index."""
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        places = {place_of(x) for x in tensors if x.dim() or place_of(x) != CPU}
        if func in BY_INDEX and place_of(args[0]) != CPU:
            places.discard(CPU)
        if len(places) > 1:
            names = " and ".join(sorted(map(str, places)))
            raise RuntimeError(f"{func.__name__}: expected tensors on one device, got {names}")
        return next(iter(places), CPU)

    def _moved(self, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if func == Tensor.cpu:
            args = (CPU,)
        if args and isinstance(args[0], Tensor):
            args = (place_of(args[0]), args[0].dtype)
        anew = kwargs.pop("copy", False)
        device, dtype, wait_not, _ = torch._C._nn._parse_to(*args, **kwargs)
        place = place_of(x) if device is None else _with_index(device)
        if wait_not and place != place_of(x):
            assert getattr(x, "_pinned", False), "a copy from memory that may be used again"
            assert place != CPU, "a copy to the CPU that nobody can wait for"
        if place == place_of(x) and dtype in (None, x.dtype) and not anew:
            return x
        found = x.to(x.dtype if dtype is None else dtype)
        return _mark(found.detach().clone() if found is x else found, place)

    def _copied(self, to: Tensor, x: Tensor, non_blocking: bool = False) -> Tensor:
        if non_blocking and place_of(to) == CPU != place_of(x):
            assert getattr(to, "_pinned", False), "a copy to memory that is not pinned"
            now = x.detach().clone()
            to.fill_(GARBAGE if to.dtype != torch.bool else False)
            self.under_way.setdefault(place_of(x), []).append((to, now))
            return to
        assert not non_blocking, "a copy that nobody waits for"
        return to.copy_(x)


class EventOnPaper:
    """In the place of `torch.cuda.Event`."""

    mode: GPUsOnPaper

    def record(self, stream: torch.device) -> None:
        """What is under way on a device; `current_stream` gives the device itself."""
        self.copies = self.mode.under_way.pop(_with_index(stream), [])

    def synchronize(self) -> None:
        """Wait for it."""
        with torch.inference_mode():  # where they may have begun
            for to, x in self.copies:
                to.copy_(x)


def place_of(x: Tensor) -> torch.device:
    """Where a tensor says that it lies."""
    return getattr(x, "_place", CPU)


def _mark(x: Tensor, place: torch.device, pinned: bool = False) -> Tensor:
    x._place, x._pinned = _with_index(place), pinned  # type: ignore[attr-defined]
    return x


def _with_index(device: torch.device) -> torch.device:
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else CPU


_PROPERTIES: dict[Any, Callable[[torch.device], Any]] = {
    Tensor.device.__get__: lambda place: place,
    Tensor.is_cuda.__get__: lambda place: place.type == "cuda",  # type: ignore[attr-defined]
    Tensor.is_cpu.__get__: lambda place: place == CPU,  # type: ignore[attr-defined]
}


@contextmanager
def gpus_on_paper(monkeypatch: pytest.MonkeyPatch) -> Iterator[GPUsOnPaper]:
    """As long as the `with` lasts, devices "cuda:N" can be used. No Triton kernel runs."""
    mode = GPUsOnPaper()
    event = type("Event", (EventOnPaper,), {"mode": mode})
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "Event", event)
        patch.setattr(torch.cuda, "current_stream", lambda device: device)
        patch.setattr(torch.cuda, "synchronize", lambda device=None: None)
        patch.setattr("tappa.kernels.launching.triton", None)
        with mode:
            yield mode


class MovingHook(AlignDevicesHook):
    """Moves what a module is given, as `device_map` has it done; weights are there already."""

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Nothing to move."""
        return module


def spread(model: PreTrainedModel, places: dict[str, str]) -> PreTrainedModel:
    """Lay modules on devices, with the hooks by which accelerate moves what they are given.

    Every module lies where the longest of these names that it begins with is laid; "" is the model.
    """
    skipped: Any = model._skip_keys_device_placement
    for name, module in model.named_modules():
        above = (n for n in places if not n or f"{name}.".startswith(f"{n}."))
        place = torch.device(places[max(above, key=len)])
        weights = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        for tensor in weights:
            _mark(tensor, place)
        if weights or name in places:
            hook = MovingHook(place, io_same_device=not name, skip_keys=skipped)
            add_hook_to_module(module, hook)
    return model
