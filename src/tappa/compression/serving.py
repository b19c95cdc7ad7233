"""What `with` does: prompts that the model gets meanwhile are read into a compressed cache.

`generate` is handed the cache from the start, so that it can prepare it (beams, drafts that are
taken back). What it calls while it writes is its own affair and gets no cache: logits processors
that ask the model, assistants, drafts of fewer layers.
"""

import threading
import weakref
from contextvars import ContextVar
from typing import Any, Protocol, runtime_checkable

from torch import nn

from tappa.cache_argument import cache_among, rename_cache
from tappa.compression.claim import Claim


@runtime_checkable
class Served(Protocol):
    """A cache that can be filled anew."""

    model: Any
    claim: Claim

    def reset(self) -> None:
        """Forget everything."""


# of this thread or task: caches whose `with` it is in, and models whose `generate` it runs
_serving: ContextVar[tuple[Served, ...]] = ContextVar("serving", default=())
_writing: ContextVar[tuple[nn.Module, ...]] = ContextVar("writing", default=())
_exchanging = threading.Lock()  # a model's `generate`


def start_serving(cache: Served) -> None:
    """From now on, prompts that this thread or task gives to the model are read into the cache."""
    _serving.set((*_serving.get(), cache))
    with _exchanging:
        known = vars(cache.model).get("generate")
        generate = known if isinstance(known, _Generate) else _Generate(cache.model, known)
        generate.users += 1
        cache.model.generate = generate


def stop_serving(cache: Served) -> None:
    """No longer: the model is as it was before."""
    _serving.set(tuple(other for other in _serving.get() if other is not cache))
    with _exchanging:
        generate = cache.model.generate
        generate.users -= 1
        if generate.users == 0 and generate.before is None:
            del cache.model.generate
        elif generate.users == 0:
            cache.model.generate = generate.before


def served_by(model: nn.Module) -> Served | None:
    """The cache for a prompt that comes to this model now, outside of its `generate`."""
    return None if any(model is other for other in _writing.get()) else _innermost(model)


def _innermost(model: nn.Module) -> Served | None:
    return next((cache for cache in reversed(_serving.get()) if cache.model is model), None)


class _Generate:
    """In the place of a model's `generate`, as long as there is a `with` for it."""

    def __init__(self, model: nn.Module, before: Any) -> None:
        self.model, self.before, self.users = weakref.ref(model), before, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What `generate` gives, on the cache of the `with` that this thread or task is in."""
        model: Any = self.model()
        cache, generate = served_by(model), self.before or _own_generate(model)
        if cache is None:
            return generate(*args, **kwargs)
        token = _writing.set((*_writing.get(), model))
        try:
            if cache_among(kwargs) is not None or kwargs.get("use_cache") is False:
                return generate(*args, **kwargs)
            with cache.claim:
                cache.reset()
                kwargs = rename_cache(model, kwargs, cache) | _corrections(model, kwargs)
                return generate(*args, **kwargs)
        finally:
            _writing.reset(token)

    def __reduce__(self) -> Any:
        """In a copy of the model, which no `with` is for: its plain `generate`."""
        return _own_generate, (self.model(),)


def _own_generate(model: Any) -> Any:
    return type(model).generate.__get__(model)


def _corrections(model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Settings of a generation config that would keep `generate` from using the cache given."""
    configs = [kwargs.get("generation_config"), model.generation_config]
    found: dict[str, Any] = {}
    for name, wanted in (("use_cache", True), ("cache_implementation", None)):
        asked = [kwargs.get(name), *(getattr(config, name, None) for config in configs)]
        if next((value for value in asked if value is not None), wanted) != wanted:
            found[name] = wanted
    return found
