"""A model of Llama-3.1-8B's shape with random weights on a GPU, and how time is taken there."""

import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def llama(layers: int = 32, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """32 layers, 32 heads, 8 KV heads, d = 128, bfloat16: 8.0 billion parameters, 16 GB."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=2**18,
        rope_parameters=ROPE,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def gpu() -> dict[str, Any]:
    """Device, versions and commit."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
    }


def milliseconds(run: Callable[[], object]) -> float:
    """Of one call, the work that it leaves to the GPU included."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def spread(values: list[float]) -> dict[str, Any]:
    """Median, smallest, largest."""
    numbers = [statistics.median(values), min(values), max(values)]
    return dict(zip(("median", "min", "max"), (round(x, 4) for x in numbers), strict=True)) | {
        "n": len(values)
    }


def peak_gb(run: Callable[[], object]) -> float:
    """Largest memory of tensors while something runs, those from before included."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return round(torch.cuda.max_memory_allocated() / 1e9, 2)


def kernels(run: Callable[[], object], top: int = 14) -> list[str]:
    """The GPU kernels that take most time: milliseconds, calls, name."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    found = sorted(profile.key_averages(), key=lambda e: -e.self_device_time_total)
    return [
        f"{e.self_device_time_total / 1000:9.3f} {e.count:6d} {e.key[:90]}" for e in found[:top]
    ]
