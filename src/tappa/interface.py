"""A function of ours in the place of a model's attention kernel, by transformers' own interface.

Nothing is patched. While a switch is on, the model's config names a function that is registered
with AttentionInterface. It serves every thread: one that has a switch of this model on gets the
function of that switch, any other the model's own kernel. So a model may be switched by one thread
while others run it. The names stay registered, as a thread may be on its way to one.
"""

import sys
import threading
import weakref
from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tappa.attention_profile import Attention
from tappa.errors import CaptureError, ModelError

PREFIX = "tappa_"
# What models hand to a kernel beside queries and keys, that changes the attention: terms of the
# softmax, and which keys each query sees (these models mask them only for kernels that they know)
ADDED = "s_aux", "sinks", "position_bias"
CHOSEN = "indices", "block_indices"
Attend = Callable[..., tuple[Tensor, Tensor | None]]


class AttentionSwitch:
    """Turns `attend(module, query, key, value, attention_mask, **kwargs)` on and off in a model.

    While it is on, the model calls `attend` in every attention layer, in the thread that has turned
    it on. `own_kernel(module)` is the function that it would have called. Masks are made for that
    one.
    """

    masks = True  # whether the model is to make masks for `attend`

    def __init__(self, model: PreTrainedModel, attend: Attend) -> None:
        modules = (m for m in model.modules() if hasattr(m, "config"))
        self.configs: dict[int, Any] = {id(m.config): m.config for m in modules}
        self.config = model.config.get_text_config()
        self.attend = attend

    def renewed(self, attend: Attend, masks: bool = True) -> "AttentionSwitch":
        """One of the same model for another function: it need not look at all modules again.

        Where it makes no masks, torch.compile follows `attend`: it must be the same each time.
        """
        twin = copy(self)
        twin.attend, twin.masks = attend, masks
        if not masks and attend not in _followed:
            _followed.append(attend)
        return twin

    @property
    def wrapped(self) -> str:
        """The attention that the model has when no switch is on."""
        return implementation_of(self.config)

    def on(self) -> None:
        """Make the model use the function, for this thread."""
        if any(other.config is self.config for other in _on_here()):
            raise CaptureError("this model is already being captured or compressed")
        if getattr(self.config, "is_causal", True) is False:
            raise ModelError("expected a causal model, the config says is_causal=False")
        with _switching:
            for config in self.configs.values():
                _switch(config)
        _here.switches = (*_here.switches, weakref.ref(self))

    def off(self) -> None:
        """Put everything back. Safe to call twice."""
        if not any(other is self for other in _on_here()):
            return
        _here.switches = tuple(ref for ref in _here.switches if ref() not in (self, None))
        with _switching:
            for config in self.configs.values():
                _switch_back(config)

    def own_kernel(self, module: nn.Module) -> Attend:
        """The attention function that the model would have called."""
        return own_kernel(module)


def implementation_of(config: Any) -> Any:
    """The attention that a config asks for, whether or not a thread has it switched right now."""
    name = config._attn_implementation
    return name.removeprefix(PREFIX) if isinstance(name, str) else name


def own_kernel(module: nn.Module) -> Attend:
    """The attention function that a module calls when no switch is on."""
    name, source = implementation_of(module.config), sys.modules[type(module).__module__]
    eager = getattr(source, "eager_attention_forward", None)
    if name == "eager" and eager is not None:
        return eager
    kernel = getattr(source, "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)[name]
    return _told_its_name(kernel) if "flash" in name else kernel


# ---- what all threads see: configs that name our functions


_switching = threading.Lock()
_users: dict[int, int] = {}  # switches that are on, by the id of a config that they are on for


def _switch(config: Any) -> None:
    own = implementation_of(config)
    if not isinstance(own, str):  # of a part that has no attention
        return
    _register(own)
    _users[id(config)] = _users.get(id(config), 0) + 1
    # the setter of _attn_implementation would change the configs of all parts too
    config._attn_implementation_internal = PREFIX + own


def _switch_back(config: Any) -> None:
    left = _users.pop(id(config), 0) - 1
    if left > 0:
        _users[id(config)] = left
    else:
        config._attn_implementation_internal = implementation_of(config)


def _register(own: str) -> None:
    """The function, and its twin that makes masks, first: a model without it makes none."""
    name = PREFIX + own
    if own in ALL_MASK_ATTENTION_FUNCTIONS and name not in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, _mask_of(own))
    AttentionInterface.register(name, _attend)


# ---- what one thread sees: its own switches, the innermost last


class _Here(threading.local):
    switches: "tuple[weakref.ref[AttentionSwitch], ...]" = ()


_here = _Here()


def _on_here() -> list[AttentionSwitch]:
    """Those of this thread. One whose owner is gone, after Ctrl-C say, is on no more."""
    return [switch for ref in _here.switches if (switch := ref()) is not None]


def _attend(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """What models call while a switch is on, in any thread."""
    if not torch.compiler.is_compiling():
        return _choose(module)(module, *args, **kwargs)
    number = _followed_here()
    attend = _outside_the_graph if number is None else _followed[number]
    return attend(module, *args, **kwargs)


def _choose(module: nn.Module) -> Attend:
    number = id(module.config)
    for switch in reversed(_on_here()):
        if number in switch.configs:
            return switch.attend
    return own_kernel(module)


@torch.compiler.disable
def _outside_the_graph(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return _choose(module)(module, *args, **kwargs)


_followed: list[Attend] = []  # by torch.compile: functions of switches without masks


# what runs on such a switch has a cache of a kind of its own: constants of what is compiled for it
@torch.compiler.assume_constant_result
def _followed_here() -> int | None:
    switches = _on_here()
    return _followed.index(switches[-1].attend) if switches and not switches[-1].masks else None


@torch.compiler.assume_constant_result
def _masks_wanted() -> bool:
    switches = _on_here()
    return not switches or switches[-1].masks


def _mask_of(own: str) -> Callable[..., Any]:
    def mask(*args: Any, **kwargs: Any) -> Any:
        """What the model's own kernel gets; None where nobody looks at it."""
        return ALL_MASK_ATTENTION_FUNCTIONS[own](*args, **kwargs) if _masks_wanted() else None

    return mask


class _Told:
    """Something with one attribute changed."""

    def __init__(self, whole: Any, **changed: Any) -> None:
        self._whole = whole
        self.__dict__.update(changed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)


def _told_its_name(kernel: Attend) -> Attend:
    """Flash attention looks its own name up in the config of the module, and loads what it says."""

    def called(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        name = implementation_of(module.config)
        config = _Told(module.config, _attn_implementation=name)
        return kernel(_Told(module, config=config), *args, **kwargs)

    return called


def attention_of(module: nn.Module, query: Tensor, kwargs: dict) -> Attention:
    """Scale, window and soft-capping as the model passes them to its kernel."""
    for names, what in (ADDED, "adds {} to its attention"), (CHOSEN, "attends to chosen keys ({})"):
        for name in names:
            if kwargs.get(name) is not None:
                said = what.format(name)
                raise ModelError(f"{type(module).__name__} {said}, which tappa cannot analyse")
    if kwargs.get("is_causal") is False and query.shape[2] > 1:
        raise ModelError(f"expected causal attention, {type(module).__name__} asks for another")
    scale = kwargs.get("scaling")
    return Attention(
        scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
        window=kwargs.get("sliding_window"),
        softcap=kwargs.get("softcap"),
    )
