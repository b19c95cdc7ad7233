"""Checks of the numbers that make up a method, and of token ids."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tappa.errors import CompressionError
from tappa.wording import described

COUNTS = {"window", "sinks", "kernel", "future"}


def check_range(
    name: str,
    value: int | float,
    low: int | float,
    high: int | float = math.inf,
    above: bool = False,
) -> None:
    """Raise CompressionError unless `low <= value <= high` (`low < value` if `above`).

    Numbers of `COUNTS` have to be whole.
    """
    kinds = (int,) if name in COUNTS else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise CompressionError(f"expected {name} as {kinds[-1].__name__}, got {value!r}")
    if (low < value if above else low <= value) and value <= high:
        return
    limit = f"above {low}" if above else f"of at least {low}"
    upper = "" if math.isinf(high) else f" and at most {high}"
    raise CompressionError(f"expected {name} {limit}{upper}, got {value!r}")


def check_ids(input_ids: Any, model: PreTrainedModel) -> None:
    """Raise CompressionError unless these are token ids of some rows, of equal length."""
    if not isinstance(input_ids, Tensor):
        raise CompressionError(
            f"expected token ids as a tensor (rows, tokens), got {_instead_of_ids(input_ids)}"
        )
    fits = input_ids.dtype in (torch.int32, torch.int64)
    if input_ids.dim() != 2 or input_ids.numel() == 0 or not fits:
        hint = ": ids[None] makes a row of them" if fits and input_ids.dim() == 1 else ""
        raise CompressionError(
            f"expected token ids of shape (rows, tokens), got {input_ids.dtype} of shape "
            f"{tuple(input_ids.shape)}{hint}"
        )
    least, most = input_ids.min().item(), input_ids.max().item()
    vocabulary = int(model.config.get_text_config().vocab_size)
    if least < 0 or most >= vocabulary:
        at = least if least < 0 else most
        raise CompressionError(f"expected ids from 0 to {vocabulary - 1}, got {at}")


def check_padding(mask: Any, input_ids: Tensor) -> None:
    """Raise CompressionError unless this is an attention mask for token ids, or None."""
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise CompressionError(f"expected an attention mask as a tensor, got {described(mask)}")
    if mask.shape != input_ids.shape:
        shapes = f"{tuple(mask.shape)} for ids of shape {tuple(input_ids.shape)}"
        raise CompressionError(f"expected an attention mask of the ids' shape, got {shapes}")


def _instead_of_ids(value: Any) -> str:
    """What came, and how to make ids of it."""
    if isinstance(value, str):
        return 'a text: tokenizer(text, return_tensors="pt").input_ids has its ids'
    if isinstance(value, Mapping):
        return f"a {type(value).__name__}: its .input_ids are wanted"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__}: torch.tensor([ids]) makes a row of them"
    return described(value)
