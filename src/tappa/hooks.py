"""Hooks in a model that several threads run at once.

Torch calls a hook for the passes of all threads, and without `kwargs` while another thread puts it
in or takes it out.
"""

import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

_registering = threading.Lock()


def add_hook(
    register: Callable[..., RemovableHandle], hook: Any, **options: Any
) -> RemovableHandle:
    """`register(hook, **options)`, a method of a module, by one thread at a time.

    Torch numbers hooks without a lock: two threads could get one number, and lose a hook.
    """
    with _registering:
        return register(hook, **options)


def of_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that sees the passes of the thread that makes it, and of no other."""
    thread = threading.get_ident()

    @torch.compiler.disable  # a compiled model breaks its graph here
    def mine(*args: Any) -> Any:
        return hook(*args) if threading.get_ident() == thread else None

    return mine


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


def remove_all(handles: Iterable[RemovableHandle]) -> None:
    """Take hooks out of the modules that they are in."""
    for handle in handles:
        handle.remove()
