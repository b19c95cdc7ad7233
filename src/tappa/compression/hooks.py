"""Hooks that live as long as a cache does, and that no copy of a model takes along."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle


class LateHook:
    """Calls a bound method for as long as its object lives, without keeping it alive.

    In a model that is copied or pickled meanwhile, it does nothing.
    """

    def __init__(self, method: Callable[..., Any] | None = None) -> None:
        self._method = None if method is None else weakref.WeakMethod(method)

    @torch.compiler.disable  # a compiled model breaks its graph here
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The method's answer, None once its object is gone."""
        method = None if self._method is None else self._method()
        return None if method is None else method(*args, **kwargs)

    def __reduce__(self) -> tuple[type, tuple]:
        return LateHook, ()


def remove_all(handles: tuple[RemovableHandle, ...]) -> None:
    """Take hooks out of the modules that they are in."""
    for handle in handles:
        handle.remove()
