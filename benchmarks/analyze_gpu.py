"""`analyze` on Llama-3.1-8B's shape with random weights: against plain prefill, and its parts."""

import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tappa import layer_statistics
from tappa.capture import prefill
from tappa.layer_statistics import PromptLayer, PromptReading, Settings

Say = Callable[..., None]
PARTS = {
    "unit vectors": (layer_statistics, "_unit_vectors"),
    "season": (layer_statistics, "best_season"),
    "profile": (PromptLayer, "_add_profile"),
    "similarity and channels": (PromptLayer, "_add_vectors"),
    "bounds": (layer_statistics, "check_bounds"),
    "expected persistence": (layer_statistics, "expected_persistence"),
    "observed seasons": (layer_statistics, "observed_seasons"),
    "all of a layer": (PromptLayer, "add"),
}
_MODELS: list[PreTrainedModel] = []


def model() -> PreTrainedModel:
    """32 layers, 32 heads and 8 KV heads of 128 dimensions, bfloat16; made once."""
    if not _MODELS:
        config = LlamaConfig(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=131072,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        )
        torch.manual_seed(0)
        with torch.device("meta"):
            made = LlamaForCausalLM(config)
        for x in made.parameters():  # buffers stay as they are: frequencies are float32
            x.data = x.data.to(torch.bfloat16)
        made = made.to_empty(device="cuda").eval()
        for name, x in [*made.named_parameters(), *made.named_buffers()]:
            if x.dim() > 1:
                torch.nn.init.normal_(x, std=0.02)
            elif "inv_freq" in name:
                exponent = torch.arange(0, 128, 2, device="cuda", dtype=torch.float32) / 128
                x.copy_(500000.0**-exponent)
            else:
                torch.nn.init.ones_(x)
        _MODELS.append(made)
    return _MODELS[0]


def plain(ids: torch.Tensor) -> None:
    with torch.inference_mode():
        model()(ids, use_cache=False, logits_to_keep=1)


def analyze(ids: torch.Tensor) -> None:
    """What tappa.analyze does with one prompt, without a tokenizer."""
    reading = PromptReading(Settings(), ids.shape[1])
    prefill(model(), ids, reading.add, logits_to_keep=1)
    reading.statistics()


def seconds(run: Callable[[torch.Tensor], None], ids: torch.Tensor) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    run(ids)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def prompt(tokens: int) -> torch.Tensor:
    return torch.randint(0, 128256, (1, tokens), device="cuda")


def compare(tokens: int, n: int, say: Say) -> None:
    """Plain prefill and analysis in turns (both have run before), then once more in parts."""
    ids, forms = prompt(tokens), (plain, analyze)
    times = [[seconds(form, ids) for form in forms] for _ in range(n)]
    ratios = sorted(b / a for a, b in times)
    each = {form.__name__: [round(row[i], 3) for row in times] for i, form in enumerate(forms)}
    ratio = round(statistics.median(ratios), 3)
    spread = [round(ratios[0], 3), round(ratios[-1], 3)]
    say(f"analyze {tokens} against plain", ratio=ratio, spread=spread, n=n, seconds=each)
    say(f"parts of analyze {tokens}, ms", **parts(ids))
    say("waits for the GPU in 32 layers", **waits(ids[:, :2048]))


def warm_up(tokens: int) -> None:
    """Compile the kernels, and let the allocator have what it needs."""
    for form in (plain, analyze):
        form(prompt(tokens))


def once(tokens: int, say: Say) -> None:
    """One analysis of a prompt in one piece, with its peak memory."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    taken = round(seconds(analyze, prompt(tokens)), 2)
    peak = torch.cuda.max_memory_allocated() / 2**30
    reserved = torch.cuda.max_memory_reserved() / 2**30
    say(
        f"analyze {tokens} once",
        seconds=taken,
        peak_gib=round(peak, 2),
        peak_reserved_gib=round(reserved, 2),
    )


def waits(ids: torch.Tensor) -> dict[str, int]:
    """How often the CPU waits for the GPU in one analysis, by line of code."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            analyze(ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return dict(Counter(f"{Path(w.filename).name}:{w.lineno}" for w in told).most_common(12))


def parts(ids: torch.Tensor) -> dict[str, float]:
    """Milliseconds of each part, all layers together, between events of the GPU."""
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {n: [] for n in PARTS}
    before = {name: getattr(*where) for name, where in PARTS.items()}

    def watched(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            result = run(*args, **kwargs)
            end.record()
            events[name].append((start, end))
            return result

        return call

    try:
        for name, (owner, attribute) in PARTS.items():
            setattr(owner, attribute, watched(name, before[name]))
        analyze(ids)
    finally:
        for name, (owner, attribute) in PARTS.items():
            setattr(owner, attribute, before[name])
    torch.cuda.synchronize()
    return {
        name: round(sum(a.elapsed_time(b) for a, b in pairs), 1) for name, pairs in events.items()
    }


if __name__ == "__main__":

    def say(what: str, **figures: Any) -> None:
        print(what, figures)

    warm_up(32768)
    compare(32768, 3, say)
    once(131072, say)
