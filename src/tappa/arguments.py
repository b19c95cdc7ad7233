"""Checks of arguments, shared by public functions: errors say what was expected and what came."""

import operator
import os
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from tappa.errors import ModelError, TappaError
from tappa.wording import described


def whole_number(name: str, value: Any, least: int, error: type[TappaError] = TappaError) -> int:
    """The value as an int, NumPy's whole numbers included. Raises `error` for anything else."""
    try:
        number = operator.index(value)
    except (TypeError, ValueError):
        number = least - 1
    if number < least or isinstance(value, bool):
        came = described(value)
        raise error(f"expected {name} as a whole number from {least} on, got {came}")
    return number


def finite_number(name: str, value: Any, error: type[TappaError] = TappaError) -> float:
    """The value as a float from 0 on. Raises `error` for anything else, NaN and infinity too."""
    try:
        number = float("nan") if isinstance(value, bool | str | bytes) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        number = float("nan")
    if not 0 <= number < float("inf"):
        raise error(f"expected {name} as a number from 0 on, got {described(value)}")
    return number


def path_of(value: Any, error: type[TappaError] = TappaError) -> Path:
    """The value as a path. Raises `error` for what is none."""
    if not isinstance(value, str | os.PathLike):
        raise error(f"expected the path of a file, got {described(value)}")
    return Path(value)


def check_callable(name: str, value: Any) -> None:
    """Raise TappaError for what is neither None nor a function."""
    if value is not None and not callable(value):
        raise TappaError(f"expected {name} as a function, got {described(value)}")


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
