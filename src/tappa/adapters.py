"""The model that a caller hands over: what is none, and what runs inside one of peft."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tappa.errors import ModelError
from tappa.wording import described


def require_model(model: Any) -> None:
    """Raise ModelError for what is no model, such as its name."""
    if isinstance(model, nn.Module) and hasattr(model, "config"):
        return
    came, hint = described(model), ""
    if isinstance(model, str | Path):
        hint = ": load it first, model, tokenizer = tappa.load(...)"
    elif isinstance(model, PreTrainedTokenizerBase):
        came, hint = "a tokenizer", ": the model comes first"
    elif isinstance(model, tuple):
        came, hint = f"a {type(model).__name__}", ": model, tokenizer = tappa.load(...) takes apart"
    raise ModelError(f"expected a model of transformers, got {came}{hint}")


def require_tokenizer(tokenizer: Any) -> None:
    """Raise ModelError for what is no tokenizer."""
    if not callable(tokenizer) or isinstance(tokenizer, nn.Module | type):
        came = f"a {type(tokenizer).__name__}" if callable(tokenizer) else described(tokenizer)
        raise ModelError(
            f"expected a tokenizer of transformers, got {came}: tappa.load gives one with the model"
        )


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
