"""Would a model of a config run? Tried on tensors that have shapes and no content."""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from transformers import AutoModelForCausalLM, PreTrainedConfig

from tappa.cache_argument import cache_among, with_cache

_TOKENS = 3
_BY_CONTENT = (DataDependentOutputException, DynamicOutputShapeException)


def obstacle(config: PreTrainedConfig, whole: PreTrainedConfig) -> Exception | None:
    """Why a model of a changed config would not read a prompt and write on; None where it would.

    Takes no memory for weights. None, too, where a model of the `whole` config fails in the same
    trial, and where what happens depends on numbers: then the trial tells nothing.
    """
    failure = _failure(config)
    return None if failure is None or _failure(whole) is not None else failure


def _failure(config: PreTrainedConfig) -> Exception | None:
    with _quiet(), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        try:
            own = copy.deepcopy(config)  # a model keeps and changes what it is given
            model: Any = AutoModelForCausalLM.from_config(own, trust_remote_code=False).eval()
            model.config._experts_implementation = "batched_mm"  # others look at numbers
            ids = torch.zeros(1, _TOKENS, dtype=torch.long)
            cache = cache_among(model(ids, use_cache=True))
            if cache is not None:
                model(ids[:, :1], use_cache=True, **with_cache(model, cache))
        except _BY_CONTENT:
            return None
        except Exception as error:  # whatever a model raises
            return error
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the traceback that PyTorch logs of an operation whose shapes do not fit."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
