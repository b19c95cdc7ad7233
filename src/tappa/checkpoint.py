"""Checkpoint folders: config, safetensors and tokenizer that fit each other, or a ModelError."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from tappa.errors import ModelError
from tappa.files import digest_of
from tappa.tensor_parallel import whole

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


class LoadedModel(NamedTuple):
    """A model ready for analysis and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def __repr__(self) -> str:
        model, tokenizer = self
        kind = str(model.dtype).removeprefix("torch.")
        what = f"{type(model).__name__} {model.name_or_path}, {kind} on {model.device}"
        return f"<LoadedModel {what}; {type(tokenizer).__name__} of {len(tokenizer):,} tokens>"


def load_folder(folder: Path, label: str, options: dict[str, Any]) -> LoadedModel:
    """The causal model and the tokenizer in a folder.

    `options` go to transformers; `label` names the model in errors.
    """
    config = _read_config(folder, label, options["trust_remote_code"])
    _check_files(folder, label)
    with library_errors(f"cannot load the model {label}"):
        model = load_model(folder, label, config=config, use_safetensors=True, **options)
    return LoadedModel(model, _read_tokenizer(folder, label, options["trust_remote_code"]))


def describe_folder(
    folder: Path, label: str, trust_remote_code: bool
) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """The config and the tokenizer in a folder: no weight is read. Raises ModelError."""
    config = _read_config(folder, label, trust_remote_code)
    return config, _read_tokenizer(folder, label, trust_remote_code)


def _read_tokenizer(folder: Path, label: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    with library_errors(f"cannot load the tokenizer of {label}"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


def load_model(folder: Path, label: str, **options: Any) -> PreTrainedModel:
    """The causal model in a folder, whose weights fit its config."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are reported, and refused here
        **options,
    )
    model, report = loaded
    _check_fit(report, label)
    return model


def _read_config(folder: Path, label: str, trust_remote_code: bool) -> PreTrainedConfig:
    if not (folder / "config.json").is_file():
        raise ModelError(f"expected a model folder with a config.json, got {label} without one")
    with library_errors(f"cannot read the config of {label}"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return config
    if "AutoModelForCausalLM" not in (getattr(config, "auto_map", None) or {}):
        kind = f"{label}, a model of type {config.model_type!r}"
        raise ModelError(f"expected a causal language model, got {kind}")
    if not trust_remote_code:
        raise ModelError(f"{label} needs code of its own, which trust_remote_code=True would run")
    return config


def _check_files(folder: Path, label: str) -> None:
    """Refuse what transformers reports badly or not at all: pickles, cut files, no tokenizer."""
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        found = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES)
        came = f"only {found[0]}, a pickle, which is never opened" if found else "none"
        raise ModelError(f"expected weights as safetensors in {label}, got {came}")
    for file in weights:
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            message = f"{file.name} of {label} is corrupt or cut short: {first_line(error)}"
            raise ModelError(message) from error
    if not any(any(folder.glob(name)) for name in ("tokenizer*", "vocab*", "*.model")):
        raise ModelError(f"expected a tokenizer in {label}, got no tokenizer file")


def _check_fit(report: dict[str, Any], label: str) -> None:
    """Refuse weights that do not fit the config: transformers fills such gaps at random."""
    if report["missing_keys"]:
        first, count = min(report["missing_keys"]), len(report["missing_keys"])
        raise ModelError(
            f"the weights of {label} lack {count} of the model's tensors, e.g. {first}"
        )
    if report["mismatched_keys"]:
        name, came, wanted = min(report["mismatched_keys"])
        shapes = f"expected {tuple(wanted)}, got {tuple(came)}"
        raise ModelError(f"the weights of {label} do not fit its config: {name}: {shapes}")
    if report["unexpected_keys"]:
        first, count = min(report["unexpected_keys"]), len(report["unexpected_keys"])
        warnings.warn(
            f"{label}: the model has no use for {count} of its tensors, e.g. {first}", stacklevel=5
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Without the log lines and progress bars of transformers."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Turn whatever a library raises into a ModelError of one line."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{what}: {first_line(error)}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of Rust, as in tokenizers
            raise
        raise ModelError(f"{what}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters, else the error's kind."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def fingerprint(model: PreTrainedModel) -> str:
    """Of the weights: names, shapes, and every 997th number of each tensor."""
    parts: list[Any] = []
    for name, tensor in model.state_dict().items():
        few = whole(tensor.detach()).flatten()[::997].float().cpu()
        parts.append((name, list(tensor.shape), few.double().sum().item(), few.abs().sum().item()))
    return digest_of(parts)
