"""Does a GGUF file hold the tensors of the model that its keys describe, and no more?"""

import math
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from tappa.errors import ModelError
from tappa.gguf_files import rope
from tappa.gguf_files.header import Header


def require_tensors(header: Header, config: PreTrainedConfig) -> None:
    """Raise ModelError unless file and model hold the same tensors; no weight is read for it.

    A tensor that transformers' reader has no name for would be dropped: it is named here.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if _has_reader_of_its_own(header.architecture):
        return _require_size(header, model)  # that reader tells what it does not know
    names = _names(header, model)
    _refuse("the model has no use for", [n for n in header.tensors if not _used(n, names)])
    sizes = _sizes(model)
    for name, info in header.tensors.items():
        size = sizes.get(names.get(name, ""))
        if size is not None and size != math.prod(info.shape) and "_exps" not in name:
            raise ModelError(f"expected {size} numbers in its tensor {name}, got {info.shape}")
    given = {names[n] for n in names if n in header.tensors or f"{n}.weight" in header.tensors}
    tied = set(getattr(model, "_tied_weights_keys", None) or {}) & {"lm_head.weight"}
    _refuse("it lacks", [name for name in sizes if name not in given | tied])


def _require_size(header: Header, model: PreTrainedModel) -> None:
    held = sum(math.prod(info.shape) for info in header.tensors.values())
    wanted = sum(parameter.numel() for parameter in model.parameters())
    if wanted > held:
        raise ModelError(f"expected {wanted} numbers for a model of its sizes, got {held}")


def _names(header: Header, model: PreTrainedModel) -> dict[str, str]:
    """The name in the model of each tensor that transformers can read."""
    processor: Any = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)
    names = get_gguf_hf_weights_map(model, processor(config=model.config.to_dict()))
    return {str(name): str(its) for name, its in names.items()}


def _used(name: str, names: dict[str, str]) -> bool:
    return name in names or name.removesuffix(".weight") in names or name in rope.TENSORS


def _sizes(model: PreTrainedModel) -> dict[str, int]:
    return {name: parameter.numel() for name, parameter in model.named_parameters()}


def _refuse(what: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ModelError(f"{what} {len(names)} tensors: {', '.join(names[:3])}{more}")


def _has_reader_of_its_own(architecture: str) -> bool:
    try:
        from transformers.integrations.gguf.gguf_conversion_mapping import GGUF_ARCHS
    except ImportError:  # in older versions all have the same reader
        return False
    return architecture in GGUF_ARCHS
