"""Models that peft has wrapped: what runs inside of them."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from tappa.arguments import require_model
from tappa.errors import ModelError


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a model of peft; any other model as it is.

    LoRA and its kin change the weights of that model's layers, so that it runs as the whole does.
    Raises ModelError for prompt learning (prefix tuning, prompt tuning, P-tuning), which puts
    virtual tokens before the prompt that nobody would count, and for what is no model.
    """
    require_model(model)
    inside: Any = getattr(model, "get_base_model", None)
    if inside is None:
        return model  # type: ignore[return-value]
    kind: Any = getattr(model, "active_peft_config", None)
    if getattr(kind, "is_prompt_learning", False):
        raise ModelError(
            f"expected a model of peft without virtual tokens, such as LoRA, got "
            f"{getattr(kind.peft_type, 'value', kind.peft_type)}"
        )
    return inside()
