"""What one process of `several.py` does: `several_job.py WHAT --how HOW --folder F --out OUT`.

HOW is `one` (GPU), `layers` (spread over all GPUs), `heads` (split by torchrun) or `workers`.
Prints lines of JSON; figures to be compared go to a file in OUT.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import several_models
import torch
from rich.console import Console
from transformers import DynamicCache, PreTrainedModel

import tappa
from tappa.analysis import Analysis
from tappa.cache_argument import with_cache
from tappa.cluster import ModelSource, Placement, analyze_texts, open_pool
from tappa.cluster.calibrate import calibrate_by
from tappa.compression import generate
from tappa.pruning import Calibration, Windows
from tappa.tensor_parallel import HeadShards, leave_torchrun, rank_of_torchrun
from tappa.texts import packaged_text

METHODS = (("snapkv", 256), ("tappa", 256), ("expected_attention", 256), ("h2o", 256))
NEAR_TIES = ("tightness", "season_votes")  # counts that a rounding may move
FORCED = 24  # tokens of text after a prompt
NAMES = {"one": "cuda:0", "layers": "all", "heads": "tp"}
sizes: argparse.Namespace


def say(**found: Any) -> None:
    """A line of JSON, of the first rank."""
    if rank_of_torchrun() in (None, 0):
        print(json.dumps({"how": sizes.how, **found}), flush=True)


def load(dtype: str) -> tuple[PreTrainedModel, Any]:
    device = NAMES[sizes.how]
    if not torch.cuda.is_available() and device == "cuda:0":
        device = "cpu"
    start = time.perf_counter()
    model, tokenizer = tappa.load(sizes.folder, device=device, dtype=dtype)
    wait()
    say(what="load", seconds=round(time.perf_counter() - start, 1), places=places(model))
    return model, tokenizer


def places(model: PreTrainedModel) -> dict[str, int]:
    """Weights on each device, in bytes."""
    found: dict[str, int] = {}
    for weight in model.parameters():
        local = weight.to_local() if hasattr(weight, "to_local") else weight
        device = str(local.device)
        found[device] = found.get(device, 0) + local.numel() * local.element_size()
    return found


def wait() -> None:
    for number in range(torch.cuda.device_count()):
        torch.cuda.synchronize(number)


def timed(run: Callable[[], Any], n: int) -> list[float]:
    """Seconds of n calls."""
    found = []
    for _ in range(n):
        wait()
        start = time.perf_counter()
        run()
        wait()
        found.append(round(time.perf_counter() - start, 4))
    return found


def ids_of(tokens: int, skip: int = 0) -> torch.Tensor:
    text = packaged_text()
    text = text * (1 + (tokens + skip) // len(text))
    return several_models.tokenizer()(text[skip : skip + tokens], return_tensors="pt").input_ids


# ---- figures to be compared


def analysis_arrays(found: Analysis) -> dict[str, np.ndarray]:
    return {
        f"analysis/{layer.layer}.{name}": np.asarray(value)
        for layer in found.layers
        for name, value in layer.sums.items()
        if name not in NEAR_TIES
    }


def calibration_arrays(found: Calibration) -> dict[str, np.ndarray]:
    names = ("cosines", "similarity", "output")
    return {f"calibration/{name}": getattr(found, name) for name in names}


def texts() -> list[str]:
    size, text = sizes.tokens, packaged_text()
    return [text[n * size : (n + 1) * size] for n in range(sizes.texts)]


def forced(model: PreTrainedModel, method: str, budget: int) -> dict[str, np.ndarray]:
    """Logits while a text follows a prompt on a compressed cache; what is held at the end."""
    ids, prompt = ids_of(sizes.prompt + FORCED).to(model.device), sizes.prompt
    cache, logits = tappa.compressed(model, method, min(budget, prompt // 3)), []
    with torch.inference_mode():
        model(ids[:, :prompt], **with_cache(model, cache), logits_to_keep=1)
        for step in range(prompt, prompt + FORCED):
            out = model(ids[:, step : step + 1], **with_cache(model, cache)).logits
            logits.append(out[0, -1, :512].float().cpu().numpy())
    held = {
        f"kept/{method}.{layer}.{head}": np.array(cache.positions_held(layer, head))
        for layer in range(len(cache.layers))
        for head in range(cache.compressed_layers[0].storage().kv_heads)
    }
    return {f"logits/{method}": np.stack(logits)} | numbered(held, cache.shards)


def numbered(held: dict[str, np.ndarray], shards: HeadShards) -> dict[str, np.ndarray]:
    """With the numbers that heads have in the whole model."""
    local = 1 + max(int(name.split(".")[-1]) for name in held)
    return {
        f"{name.rpartition('.')[0]}.{shards.rank * local + int(name.split('.')[-1])}": x
        for name, x in held.items()
    }


def evaluation(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """-log p of a text after a prompt that is read once for all methods, as `tappa eval` does."""
    ids = ids_of(sizes.prompt + 65, 5000).to(model.device)
    recording = tappa.record(model, ids[:, : sizes.prompt])
    found = {}
    for method, budget in (("full", None), *METHODS):
        size = None if budget is None else min(budget, sizes.prompt // 3)
        (cache,) = recording.compress(method, [size])
        with torch.inference_mode():
            logits = model(ids[:, sizes.prompt : -1], **with_cache(model, cache)).logits
        following = ids[0, sizes.prompt + 1 :].to(logits.device)
        log = logits[0].float().log_softmax(-1).gather(1, following[:, None])
        found[f"nll/{method}"] = np.array([-float(log.mean())])
    return found


def written(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """Greedy text, by whatever steps are the default."""
    cache = tappa.compressed(model, "tappa", min(256, sizes.prompt // 3))
    out = generate(cache, ids_of(sizes.prompt), 64)
    return {"text/tappa": out[0, sizes.prompt :].cpu().numpy()}


def figures() -> None:
    """All of them, several times over: a race shows as a difference between the times."""
    model, tokenizer = load("float32")
    rank, first = rank_of_torchrun() or 0, dict[str, np.ndarray]()
    for time_number in range(sizes.repeat):
        start = time.perf_counter()
        found = analysis_arrays(tappa.analyze(model, tokenizer, texts(), tokens=sizes.tokens))
        window = min(1024, sizes.tokens // 2)
        calibration = tappa.calibrate(model, tokenizer, texts(), window=window, limit=8)
        found |= calibration_arrays(calibration)
        for method, budget in METHODS:
            found |= forced(model, method, budget)
        found |= evaluation(model) | written(model)
        first = first or found
        same = [name for name in found if np.array_equal(found[name], first[name])]
        other = sorted(set(found) - set(same))
        took = round(time.perf_counter() - start, 1)
        say(what="figures", time=time_number, seconds=took, differ_from_first=other[:20])
    np.savez(sizes.out / f"figures-{sizes.how}-{rank}.npz", **first)


def workers() -> None:
    """Analysis and calibration by workers of Ray with a GPU each."""
    gpus = 1.0 if torch.cuda.is_available() else 0.0
    count = torch.cuda.device_count() or 2
    source = ModelSource(str(sizes.folder), "auto", "float32")
    start = time.perf_counter()
    with open_pool(source, Placement(count, None, gpus), Console(stderr=True)) as pool:
        found = analysis_arrays(analyze_texts(pool, texts(), tokens=sizes.tokens))
        say(what="figures", workers=count, seconds=round(time.perf_counter() - start, 1))
        model, tokenizer = tappa.load(sizes.folder, device="cpu", dtype="float32")
        size = min(1024, sizes.tokens // 2)
        windows = Windows.of(model, tokenizer, texts(), window=size, stride=256, limit=8)
        found |= calibration_arrays(calibrate_by(pool, model, windows))
    np.savez(sizes.out / "figures-workers-0.npz", **found)


# ---- speed and memory


def speed() -> None:
    """Seconds, tokens per second, and gigabytes of each GPU."""
    model, tokenizer = load("bfloat16")
    text = packaged_text() * (1 + sizes.tokens // len(packaged_text()))
    for tokens in (sizes.tokens // 4, sizes.tokens):

        def analyze(tokens: int = tokens) -> None:
            tappa.analyze(model, tokenizer, text, tokens=tokens, chunk=sizes.chunk)

        measured("analyze", lambda run=analyze: timed(run, 1), model, tokens=tokens)
    ids = ids_of(sizes.prompt)

    def read(method: str | None) -> None:
        cache = tappa.compressed(model, method, budget()) if method else plain_cache(model)
        with torch.inference_mode():
            model(ids.to(model.device), **with_cache(model, cache), logits_to_keep=1)

    for method in (None, "tappa"):
        name = f"prefill {method or 'plain'}"
        measured(name, lambda m=method: timed(lambda: read(m), 4), model, tokens=sizes.prompt)
    measured("decode plain", lambda: list(plain_steps(model, ids)), model, unit="per_s")
    for method, graph in (("full", None), ("tappa", None), ("tappa", False), ("snapkv", None)):
        name = f"decode {method}{'' if graph is None else ', one by one'}"
        measured(name, lambda m=method, g=graph: steps(model, ids, m, g), model, unit="per_s")


def budget() -> int:
    return max(48, sizes.prompt // 8)


def plain_cache(model: PreTrainedModel) -> DynamicCache:
    return DynamicCache(config=model.config)


def measured(
    name: str,
    run: Callable[[], list[float]],
    model: PreTrainedModel,
    unit: str = "seconds",
    **more: Any,
) -> None:
    """Say what a measurement gave: all values (the first has the warm-up), median of the others."""
    for number in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(number)
    try:
        values = run()
    except Exception as error:  # the other measurements go on
        say(what=name, error=f"{type(error).__name__}: {error}"[:600])
        return
    peaks = [torch.cuda.max_memory_allocated(n) for n in range(torch.cuda.device_count())]
    shards = HeadShards.of(model)
    if shards.ranks > 1:
        mine = torch.tensor([torch.cuda.max_memory_allocated() if peaks else 0])
        peaks = shards.gather(mine).tolist()
    gigabytes = [round(peak / 1e9, 2) for peak in peaks]
    middle = statistics.median(values[1:] or values)
    say(what=name, peak_gb=gigabytes, values=values[:8], **{unit: round(middle, 3)}, **more)


def plain_steps(model: PreTrainedModel, ids: torch.Tensor) -> Iterator[float]:
    """Tokens per second of the model alone, on its full cache, over so many steps each."""
    cache = plain_cache(model)
    with torch.inference_mode():
        logits = model(ids.to(model.device), **with_cache(model, cache), logits_to_keep=1).logits
        for _ in range(4):
            wait()
            start = time.perf_counter()
            for _ in range(sizes.new // 4):
                last = logits[:, -1].argmax(-1).to(model.device)
                logits = model(last[:, None], **with_cache(model, cache)).logits
            wait()
            yield round(sizes.new // 4 / (time.perf_counter() - start), 2)


def steps(
    model: PreTrainedModel, ids: torch.Tensor, method: str, graph: bool | None
) -> list[float]:
    """Tokens per second of `generate`: of all of it the first time; then of its steps."""
    held, rates = None if method == "full" else budget(), list[float]()
    for _ in range(3):
        shown: list[tuple[float, int]] = []

        def show(new: torch.Tensor, shown: list[tuple[float, int]] = shown) -> None:
            new.cpu()
            shown.append((time.perf_counter(), new.shape[1]))

        start = time.perf_counter()
        generate(tappa.compressed(model, method, held), ids, sizes.new, graph=graph, show=show)
        wait()
        whole = sizes.new / (time.perf_counter() - start)
        half = len(shown) // 2
        passed = shown[-1][0] - shown[half][0]
        rates.append(round(sum(n for _, n in shown[half + 1 :]) / passed if rates else whole, 2))
    return rates


def large() -> None:
    """One model that no GPU holds, over all GPUs of this process."""
    start = time.perf_counter()
    model: Any = several_models.spread(sizes.shape)
    tokenizer = several_models.tokenizer()
    wait()
    say(what="build", seconds=round(time.perf_counter() - start, 1), places=places(model))
    model.config._name_or_path = f"{sizes.shape} of random weights"
    text = packaged_text()

    def analyze() -> None:
        tappa.analyze(model, tokenizer, text, tokens=sizes.tokens, chunk=sizes.chunk)

    measured("analyze", lambda: timed(analyze, 2), model, tokens=sizes.tokens)
    ids = ids_of(sizes.prompt)
    measured("decode plain", lambda: list(plain_steps(model, ids)), model, unit="per_s")
    measured("decode tappa", lambda: steps(model, ids, "tappa", None), model, unit="per_s")


def main() -> None:
    global sizes
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["make", "figures", "workers", "speed", "large"])
    parser.add_argument("--how", default="one")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--shape", default="small")
    for name, size in (("tokens", 2048), ("texts", 4), ("prompt", 1536), ("new", 128)):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--chunk", type=int)
    parser.add_argument("--repeat", type=int, default=3)
    sizes = parser.parse_args()
    if sizes.what == "make":
        dtype = torch.bfloat16 if sizes.shape == "8b" else torch.float32
        several_models.save(sizes.shape, sizes.folder, dtype)
        return
    {"figures": figures, "workers": workers, "speed": speed, "large": large}[sizes.what]()
    leave_torchrun()


if __name__ == "__main__":
    main()
