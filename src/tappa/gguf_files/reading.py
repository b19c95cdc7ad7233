"""read_gguf: the model in a GGUF file, as the file describes it, and its tokenizer."""

import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from tappa.checkpoint import LoadedModel, library_errors, load_model
from tappa.errors import ModelError
from tappa.gguf_files import rope
from tappa.gguf_files.config import apply_header, head_width
from tappa.gguf_files.header import Header, read_header
from tappa.gguf_files.kind import require_whole_model
from tappa.gguf_files.tensors import require_tensors
from tappa.gguf_files.tokenizer import read_tokenizer


def read_gguf(path: Path, label: str, options: dict[str, Any]) -> LoadedModel:
    """Dequantise a GGUF file, which takes about half a minute per gigabyte of float32 weights.

    Raises ModelError, before it builds anything, for a file that is no whole model, is damaged, or
    says of its model what transformers cannot do.
    """
    header, config = _described(path, label)
    failure = f"cannot read the GGUF file {label} (corrupt, cut short or of an unknown kind?)"
    with library_errors(failure), redirect_stderr(io.StringIO()):  # hides a progress bar
        model: Any = load_model(path.parent, label, gguf_file=str(path), config=config, **options)
        tokenizer = read_tokenizer(header, path.parent)
    _require_frequencies(model, header, label)
    # The weights are plain now; with the mark of quantised ones transformers would not save them.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    _end_turns(model, header)
    return LoadedModel(model, tokenizer)


def describe_gguf(path: Path, label: str) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """The config and the tokenizer in a GGUF file: no weight is read. Raises ModelError."""
    header, config = _described(path, label)
    with library_errors(f"cannot read the tokenizer of {label}"), redirect_stderr(io.StringIO()):
        return config, read_tokenizer(header, path.parent)


def _end_turns(model: PreTrainedModel, header: Header) -> None:
    """Texts end at the end of a turn too, which is a token of its own in some files."""
    names = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
    ends = list(dict.fromkeys(n for name in names if (n := header.values.get(name)) is not None))
    if model.generation_config is not None and len(ends) > 1:
        model.generation_config.eos_token_id = ends


def _described(path: Path, label: str) -> tuple[Header, PreTrainedConfig]:
    """The header and the config of a file whose keys and tensors fit each other."""
    try:
        header = read_header(path)
        require_whole_model(header)
        with library_errors("transformers cannot read its keys"):
            config = AutoConfig.from_pretrained(path.parent, gguf_file=str(path))
            apply_header(config, header)
        with library_errors("transformers cannot build its model"):
            require_tensors(header, config)
    except ModelError as error:
        raise ModelError(f"cannot use the GGUF file {label}: {error}") from error
    return header, config


def _require_frequencies(model: PreTrainedModel, header: Header, label: str) -> None:
    """Refuse a model that rotates at other frequencies than the file says."""
    for _, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if not name.endswith("inv_freq") or "original" in name:
                continue
            local = name.startswith("sliding")
            width = int(header.get("rope.dimension_count") or head_width(header))
            came, wanted = buffer.tolist(), rope.frequencies(header, width, local)
            if not rope.is_equal(came, wanted):
                raise ModelError(
                    f"cannot use the GGUF file {label}: transformers' {model.config.model_type} "
                    f"does not rotate {width} dimensions as its rope keys say"
                )
