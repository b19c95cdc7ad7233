"""A function of ours in the place of a model's attention kernel, by transformers' own interface.

Nothing is patched: the function is registered with AttentionInterface, the model's config names it
while the switch is on, and the model's own kernel is what it calls.
"""

import copy
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tappa.attention_profile import Attention
from tappa.errors import CaptureError, ModelError

PREFIX = "tappa"
# What models hand to a kernel beside queries and keys, that changes the attention: terms of the
# softmax, and which keys each query sees (these models mask them only for kernels that they know)
ADDED = "s_aux", "sinks", "position_bias"
CHOSEN = "indices", "block_indices"
Attend = Callable[..., tuple[Tensor, Tensor | None]]


class AttentionSwitch:
    """Turns `attend(module, query, key, value, attention_mask, **kwargs)` on and off in a model.

    While it is on, the model calls `attend` in every attention layer. `own_kernel(module)` is the
    function that it would have called. Masks are made for that one.
    """

    masks = True  # whether the model is to make masks for `attend`

    def __init__(self, model: PreTrainedModel, attend: Attend) -> None:
        modules = (m for m in model.modules() if hasattr(m, "config"))
        self.configs: list[Any] = list({id(m.config): m.config for m in modules}.values())
        self.config = model.config.get_text_config()
        self.name = f"{PREFIX}_{id(self):x}"  # its own, so that two models can be switched at once
        self.attend = attend
        self.wrapped = ""
        self.before: list[str] = []

    def renewed(
        self, attend: Attend, masks: bool = True, name: str | None = None
    ) -> "AttentionSwitch":
        """One of the same model for another function: it need not look at all modules again.

        With a `name` all switches of that name must be for the same function.
        """
        twin = copy.copy(self)
        twin.masks = masks
        twin.name, twin.attend = f"{PREFIX}_{name or format(id(twin), 'x')}", attend
        twin.wrapped, twin.before = "", []
        return twin

    def on(self) -> None:
        """Register the function and make the model use it."""
        self.wrapped = self.config._attn_implementation
        if self.wrapped.startswith(PREFIX):
            raise CaptureError("this model is already being captured or compressed")
        if getattr(self.config, "is_causal", True) is False:
            raise ModelError("expected a causal model, the config says is_causal=False")
        AttentionInterface.register(self.name, self.attend)
        if self.masks and self.wrapped in ALL_MASK_ATTENTION_FUNCTIONS:
            mask = ALL_MASK_ATTENTION_FUNCTIONS[self.wrapped]
            AttentionMaskInterface.register(self.name, mask)
        self.before = [config._attn_implementation for config in self.configs]
        for config in self.configs:
            config._attn_implementation = self.name

    def off(self) -> None:
        """Put everything back. Safe to call twice."""
        for config, implementation in zip(self.configs, self.before, strict=False):
            config._attn_implementation = implementation
        self.before = []
        for interface in (AttentionInterface, AttentionMaskInterface):
            interface._global_mapping.pop(self.name, None)

    def own_kernel(self, module: nn.Module) -> Attend:
        """The attention function that the model would have called."""
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        if self.wrapped == "eager" and eager is not None:
            return eager
        return ALL_ATTENTION_FUNCTIONS[self.wrapped]


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
