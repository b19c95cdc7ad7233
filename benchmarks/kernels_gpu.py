"""The kernels and `analyze` on one GPU: checks first, then every claim timed in one run.

Prints a JSON line for each figure and a table at the end; `--out` gets all of them, and cost
curves, as JSON (`runs/cost_curves.py` draws those). The shape is that of a layer of Llama-3.1-8B:
32 heads, 8 KV heads of 128 dimensions, bfloat16, laid out as models leave them. FLOPs of the
profile are those of the causal half of QK^T, once for each pass; those of flash attention are QK^T
and PV.
"""

import argparse
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import analyze_gpu
import torch
from machine import describe
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from tappa import kernels
from tappa.attention_profile import SINK_TOKENS, Attention, attention_profile_reference
from tappa.kernels import profile
from tappa.kernels.profile import Chunk
from tappa.kernels.similarity import Tiles, vector_sums
from tappa.rope import RotaryChannels
from tappa.similarity import SelfSimilarity, lag_sums

HEADS, KV_HEADS, DIM, LAGS = 32, 8, 128, 1024
SHORT, LONG = 32768, 131072
CURVE, HEAD_COUNTS = [2**n for n in range(10, 18)], (8, 16, 32, 64)
STRETCHES = {
    "16w4 ahead, by twos": Tiles(),
    "16w4 ahead": Tiles(unroll=1),
    "16w4 in 3 stages": Tiles(stages=3, unroll=1),
    "8w2 ahead, by twos": Tiles(8, warps=2),
    "16w4 ahead, by twos, 128 steps": Tiles(steps=128),
    "16w4 ahead, by twos, 64 steps": Tiles(steps=64),
}
FOUND: list[dict[str, Any]] = []


def say(what: str, **figures: Any) -> None:
    FOUND.append({"what": what, **figures})
    print(json.dumps(FOUND[-1]), flush=True)


@contextmanager
def attempt(what: str) -> Iterator[None]:
    """A part that fails is said so, and does not stop the others."""
    try:
        yield
    except Exception as error:
        say(f"FAILED {what}", error=f"{type(error).__name__}: {error}"[:500])


def timed(what: str, run: Callable[[], object], n: int = 5, **work: float) -> float:
    """Median milliseconds of n timings by events, after one call; rates of the work in them."""
    run()
    torch.cuda.synchronize()
    times = []
    for _ in range(n):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    ms = statistics.median(times)
    rates = {name: round(amount / ms / 1e9, 4) for name, amount in work.items()}
    say(what, ms=round(ms, 4), min=round(min(times), 4), max=round(max(times), 4), n=n, **rates)
    return ms


def vectors(tokens: int, heads: int = HEADS, kv: int = KV_HEADS, dim: int = DIM, **how: Any):
    """Queries and keys laid out as a model leaves them: tokens, heads, dimensions."""
    how = {"device": "cuda", "dtype": torch.bfloat16} | how
    return tuple(torch.randn(tokens, h, dim, **how).transpose(0, 1) for h in (heads, kv))


def rotary() -> RotaryChannels:
    i = torch.arange(DIM)
    theta = 500000.0 ** (-torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)
    return RotaryChannels(i[: DIM // 2], i[DIM // 2 :], theta, i[:0])


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.cpu().double(), expected.cpu().double()
    error = float((actual - expected).norm() / expected.norm().clamp_min(1e-12))
    return error if math.isfinite(error) else math.inf


def poison() -> None:
    """What torch.empty finds from now on is NaN."""
    _ = torch.full((2**28,), torch.nan, device="cuda")


def check_profile(tokens: int, dtype: torch.dtype, attention: Attention) -> tuple[str, float]:
    """Worst relative RMS of one case (a process of its own, as compiling takes long)."""
    torch.set_num_threads(1)
    q, k = vectors(tokens, 8, 2, dtype=dtype)
    q, k = 2 * q, k + 0.3
    expected = attention_profile_reference(q.cpu(), k.cpu(), attention, 130)
    poison()
    where = {"query_start": 0, "key_start": 0, "has_previous": False}
    found = kernels.profile_sums(q, k, 130, SINK_TOKENS, **asdict(attention), **where)
    what = f"check profile {tokens} {dtype} {attention}"
    if found is None:
        return what, math.inf
    return what, max(relative_rms(x, getattr(expected, name)) for name, x in found.items())


def check_similarity(name: str) -> tuple[str, float]:
    """Sums of queries and keys against those of their vectors in float32."""
    torch.set_num_threads(1)
    tokens, start, channels = 5003, 1000, rotary()
    q, k = (x + 0.5 for x in vectors(tokens, 3, 1))
    poison()
    where = *channels.slices, channels.theta.cuda(), channels.turn.cuda(), start
    worst = 0.0
    for x, found in zip((q, k), vector_sums(q, k, *where, STRETCHES[name]), strict=True):
        post = x.cpu().float()
        pre = channels.unrotate_from(post, start)
        expected = SelfSimilarity()
        expected.add(pre, post)
        before, after = expected._streams["pre"], expected._streams["post"]
        pairs = (
            (found.post, after.total),
            (found.pre, before.total),
            (found.squares, after.squares),
            (found.adjacent_post, after.adjacent),
            (found.adjacent_pre, before.adjacent),
            (found.vectors, pre.double().sum(1)),
            (found.norms, channels.norms(pre).double().sum(1)),
        )
        worst = max(worst, *(relative_rms(*pair) for pair in pairs))
    return f"check similarity {name}", worst


def check_autocorrelation() -> tuple[str, float]:
    unit = torch.nn.functional.normalize(torch.randn(3, 3001, DIM, device="cuda") + 0.1, dim=-1)
    found = kernels.autocorrelation_sums(unit, LAGS)
    expected = lag_sums(unit.double(), unit.double(), LAGS)
    return "check autocorrelation", math.inf if found is None else relative_rms(found, expected)


def checks() -> list[tuple[Callable[..., tuple[str, float]], tuple]]:
    bf16, fp16 = torch.bfloat16, torch.float16
    plain, both = Attention(0.09), Attention(0.1, window=211, softcap=9.0)
    return [
        *((check_profile, (777, dtype, plain)) for dtype in (bf16, fp16)),
        (check_profile, (613, bf16, both)),
        *((check_similarity, (name,)) for name in STRETCHES),
        (check_autocorrelation, ()),
    ]


def start_checks(pool: Any) -> list[tuple[str, Any]]:
    return [(f"{run.__name__} {args}", pool.apply_async(run, args)) for run, args in checks()]


def time_profile(tokens: int, n: int, passes: bool = True) -> None:
    """Flash attention, the profile's passes and the whole, and extra memory."""
    q, k = vectors(tokens)
    v = torch.randn_like(k)
    flops = 2.0 * DIM * HEADS * tokens * tokens

    def flash() -> None:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            batch = (x[None] for x in (q, k, v))
            scaled_dot_product_attention(*batch, is_causal=True, enable_gqa=True)

    base = timed(f"flash {tokens}", flash, n, tflops=flops)
    chunk = Chunk(q, k, DIM**-0.5)
    if passes:
        lse = profile.row_sums(chunk, SINK_TOKENS)[0]
        timed(f"pass 1 {tokens}", lambda: profile.row_sums(chunk, SINK_TOKENS), n, tflops=flops / 2)
        timed(f"pass 2 {tokens}", lambda: profile.weight_sums(chunk, lse), n, tflops=flops / 2)
        timed(f"lags {tokens}", lambda: profile.band_sums(chunk, lse, LAGS), n)
    whole = lambda: profile.profile_sums(chunk, LAGS, SINK_TOKENS)  # noqa: E731
    ms = timed(f"profile {tokens}", whole, n, tflops=flops)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    whole()
    extra = (torch.cuda.max_memory_allocated() - before) / 2**20
    say(f"profile {tokens} of flash", rate=round(base / ms, 3), extra_mib=round(extra))


def replayed(run: Callable[[], object]) -> Callable[[], object]:
    """The same work as a CUDA graph, so that launches by Python stay out of the time."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def similarity_of(q: Tensor, k: Tensor, tiles: Tiles | None = None) -> Callable[[], object]:
    channels = rotary()
    where = *channels.slices, channels.theta.cuda(), channels.turn.cuda(), 0
    return replayed(lambda: vector_sums(q, k, *where, tiles))


def time_similarity(tokens: int) -> None:
    """Queries and keys of a layer in one pass, against a copy of 2 GiB."""
    q, k = vectors(tokens)
    nbytes = 2 * (q.numel() + k.numel())
    source = torch.randn(2**30, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copied = 4 * source.numel()
    copy = timed("copy 2 GiB", lambda: target.copy_(source), 11, tbs=copied)
    for name, tiles in STRETCHES.items():
        what = f"similarity {tokens} {name}"
        with attempt(what):
            ms = timed(what, similarity_of(q, k, tiles), 11, tbs=nbytes)
            say(f"{what} of copy", rate=round(nbytes / ms / (copied / copy), 3))


def slope(points: dict[int, float]) -> float:
    """Least-squares slope of log time against log size, of the upper half of the sizes."""
    sizes = sorted(points)[len(points) // 2 :]
    x, y = ([math.log(f(n)) for n in sizes] for f in (float, lambda n: points[n]))
    mean_x, mean_y = statistics.mean(x), statistics.mean(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def cost_curves() -> dict[str, Any]:
    """Milliseconds over tokens (32 heads) and over heads (8192 tokens), with slopes."""
    forms: dict[str, Callable[[Tensor, Tensor], Callable[[], object]]] = {
        "q-similarity": similarity_of,
        "profile": lambda q, k: lambda: profile.profile_sums(Chunk(q, k, 0.09), LAGS, SINK_TOKENS),
    }
    curves: dict[str, Any] = {}
    for name, form in forms.items():
        tokens = {t: timed(f"{name}, {t} tokens", form(*vectors(t)), 3) for t in CURVE}
        heads = {
            h: timed(f"{name}, {h} heads", form(*vectors(8192, h, h // 4)), 3) for h in HEAD_COUNTS
        }
        for axis, points in (("tokens", tokens), ("heads", heads)):
            fitted = round(slope(points), 3)
            curves[f"{name} by {axis}"] = {"ms": points, "slope_of_upper_half": fitted}
            say(f"slope of {name} by {axis}", slope=fitted)
    return curves


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=100)
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("kernels-gpu.json"))
    options = parser.parse_args()
    begun = time.perf_counter()

    def left() -> float:
        return options.seconds - (time.perf_counter() - begun)

    say("machine", gpu=torch.cuda.get_device_name(), **describe())
    curves: dict[str, Any] = {}
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        results = start_checks(pool)
        with attempt("warm-up"):  # while other processes compile; timings begin when they are done
            analyze_gpu.warm_up(SHORT)
        for what, result in results:
            with attempt(what):
                name, error = result.get(timeout=max(left() - 40, 1))
                say(name, worst_relative_rms=error, good=error <= 1e-3)
    say("checked", seconds=round(time.perf_counter() - begun, 1))
    parts: list[tuple[float, str, Callable[[], object]]] = [
        (0, "profile", lambda: time_profile(SHORT, 5)),
        (0, "similarity", lambda: (time_similarity(SHORT), time_similarity(LONG))),
        (0, "analyze", lambda: analyze_gpu.compare(SHORT, 3, say)),
        (5, "long profile", lambda: time_profile(LONG, 3, passes=False)),
        (8, "curves", lambda: curves.update(cost_curves())),
        (5, "long analyze", lambda: analyze_gpu.once(LONG, say)),
    ]
    for needed, what, run in parts:
        if left() < needed:
            say(f"no time for {what}")
            continue
        with attempt(what):
            run()
        torch.cuda.empty_cache()
        say(f"done with {what}", seconds=round(time.perf_counter() - begun, 1))
        options.out.write_text(json.dumps({"figures": FOUND, "curves": curves}, indent=1))
    for figure in FOUND:
        name, rest = figure["what"], {k: v for k, v in figure.items() if k != "what"}
        print(f"{name:48}", " ".join(f"{k}={v}" for k, v in rest.items()))


if __name__ == "__main__":
    main()
