"""The kernels on one GPU: each against its reference first, then every design considered, timed.

Prints a JSON line for each figure and a table at the end. The shape is that of a layer of
Llama-3.1-8B: 32 heads, 8 KV heads of 128 dimensions, bfloat16. FLOPs of the profile are those of
the causal half of QK^T, once for each pass; those of flash attention are QK^T and PV.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from machine import describe
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from tappa.attention_profile import SINK_TOKENS, Attention, attention_profile_reference
from tappa.kernels import profile as kernels
from tappa.kernels.profile import Chunk, Tiles, Tiling
from tappa.kernels.similarity import Tiles as StepTiles
from tappa.kernels.similarity import vector_sums
from tappa.rope import RotaryChannels
from tappa.similarity import SelfSimilarity

HEADS, KV_HEADS, DIM, LAGS = 32, 8, 128, 1024
ROWS = {
    "128x128w8s3": Tiles(128, 128, warps=8),
    "128x64w8s3": Tiles(128, 64, warps=8),
    "128x64w4s3": Tiles(128, 64),
    "64x128w4s2": Tiles(64, 128, stages=2),
    "64x64w4s3": Tiles(64, 64),
    "128x128w4s2": Tiles(128, 128, stages=2),
}
WEIGHTS = {
    "queries 128/16x64w4s3": ("queries", Tiles(128, 64, 16)),
    "queries 128/16x64w4s2": ("queries", Tiles(128, 64, 16, stages=2)),
    "queries 128/8x64w4s3": ("queries", Tiles(128, 64, 8)),
    "queries 128/16x64w4s3u2": ("queries", Tiles(128, 64, 16, unroll=2)),
    "queries 128/16x128w8s3": ("queries", Tiles(128, 128, 16, warps=8)),
    "queries 128/16x128w8s2": ("queries", Tiles(128, 128, 16, warps=8, stages=2)),
    "queries 64/8x64w4s3": ("queries", Tiles(64, 64, 8)),
    "queries 64/8x64w4s3u2": ("queries", Tiles(64, 64, 8, stages=2, unroll=2)),
    "queries 64/8x128w8s3": ("queries", Tiles(64, 128, 8, warps=8)),
    "keys 64x128/16w4s3": ("keys", Tiles(64, 128, 16)),
    "keys 64x128/16w4s2": ("keys", Tiles(64, 128, 16, stages=2)),
    "keys 128x128/16w8s3": ("keys", Tiles(128, 128, 16, warps=8)),
    "keys 64x64/8w4s3": ("keys", Tiles(64, 64, 8)),
    "keys 64x64/8w4s3u2": ("keys", Tiles(64, 64, 8, stages=2, unroll=2)),
}
BANDS = {
    "64x64w4s2": Tiles(64, 64, stages=2),
    "64x64w4s3": Tiles(64, 64),
    "128x64w8s2": Tiles(128, 64, warps=8, stages=2),
    "64x128w8s2": Tiles(64, 128, warps=8, stages=2),
}
STEPS = {
    "16w4s3": StepTiles(),
    "16w4s1": StepTiles(stages=1),
    "16w4s4": StepTiles(stages=4),
    "8w4s3": StepTiles(8),
    "8w4s1": StepTiles(8, stages=1),
    "16w8s3": StepTiles(16, warps=8),
    "16w8s1": StepTiles(16, warps=8, stages=1),
    "16w4s3x128": StepTiles(16, 128),
    "16w4s3x32": StepTiles(16, 32),
    "4w1s3": StepTiles(4, warps=1),
}
TABLE: list[str] = []


def say(what: str, **figures: Any) -> None:
    print(json.dumps({"what": what, **figures}), flush=True)


@contextmanager
def attempt(what: str) -> Iterator[None]:
    """A design that does not compile or run is said so, and does not stop the others."""
    try:
        yield
    except Exception as error:
        torch.cuda.synchronize()
        say(what, failed=f"{type(error).__name__}: {error}"[:300])
        TABLE.append(f"FAILED {what}: {type(error).__name__}")


def milliseconds(run: Callable[[], object], n: int = 5) -> tuple[float, float, float]:
    """Median, smallest and largest of n timings by events, after one call to warm up."""
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
    return statistics.median(times), min(times), max(times)


def timed(
    what: str, run: Callable[[], object], flops: float = 0, nbytes: float = 0, n: int = 5
) -> float:
    ms, low, high = milliseconds(run, n)
    figures: dict[str, Any] = {"ms": round(ms, 3), "min": round(low, 3), "max": round(high, 3)}
    if flops:
        figures["tflops"] = round(flops / ms / 1e9, 1)
    if nbytes:
        figures["gbs"] = round(nbytes / ms / 1e6)
    say(what, **figures)
    TABLE.append(f"{what:44} " + " ".join(f"{k}={v}" for k, v in figures.items()))
    return ms


def vectors(
    tokens: int, heads: int = HEADS, kv: int = KV_HEADS, dim: int = DIM, dtype=torch.bfloat16
):
    """Queries and keys laid out as a model leaves them: tokens, heads, dimensions."""
    made = [torch.randn(tokens, h, dim, device="cuda", dtype=dtype) for h in (heads, kv)]
    return made[0].transpose(0, 1), made[1].transpose(0, 1).contiguous()


def chunk_of(
    queries: Tensor, keys: Tensor, attention: Attention, tiling: Tiling, **at: Any
) -> Chunk:
    place = {"query_start": 0, "key_start": 0, "has_previous": False, **at}
    return Chunk(
        queries, keys, attention.scale, attention.window, attention.softcap, tiling=tiling, **place
    )


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.cpu().double(), expected.double()
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-12))


def cases() -> list[tuple]:
    """(tokens, dim, dtype, attention, tiling): every design, types, head sizes, windows and caps."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    plain = Attention(128**-0.5)
    tilings = [
        *(Tiling(rows=tiles) for tiles in ROWS.values()),
        *(Tiling(weights=tiles, keep=keep) for keep, tiles in WEIGHTS.values()),
        *(Tiling(bands=tiles) for tiles in BANDS.values()),
    ]
    found: list[tuple] = [(777, 128, bf16, plain, tiling) for tiling in tilings]
    both = Attention(0.1, window=211, softcap=9.0)
    for keep in ("queries", "keys"):
        found.append((613, 128, bf16, both, Tiling(weights=Tiles(64, 64, 8), keep=keep)))
    for dim, dtype in ((128, fp16), (128, fp32), (64, bf16), (80, bf16), (256, bf16)):
        for attention in (plain, Attention(0.1, window=7, softcap=3.0)):
            found.append((613, dim, dtype, attention, None))
    return found


def check_case(case: tuple) -> tuple[str, dict[str, float]]:
    """Relative RMS of every figure of one case (in a process of its own, as compiling takes long)."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokens, dim, dtype, attention, tiling = case
    q, k = vectors(tokens, 4, 2, dim, dtype)
    q, k = 2 * q, k + 0.3
    expected = attention_profile_reference(q.cpu(), k.cpu(), attention, 130)
    poison = torch.full((2**26,), torch.nan, device="cuda")  # what torch.empty then finds
    del poison
    try:
        chunk = chunk_of(q, k, attention, tiling or kernels.tiling_of(q))
        found = kernels.profile_sums(chunk, 130)
        errors = {name: relative_rms(x, getattr(expected, name)) for name, x in found.items()}
    except Exception as error:
        errors = {f"{type(error).__name__}: {error}"[:300]: torch.inf}
    return str(case), errors


def check(processes: int) -> None:
    """Every design on odd sizes against the float64 reference."""
    worst = 0.0
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for what, errors in pool.imap_unordered(check_case, cases()):
            error = max(x if x == x else torch.inf for x in errors.values())
            worst = max(worst, error)
            if not error < 1e-3:
                say("check", case=what, errors={n: f"{x:.2e}" for n, x in errors.items()})
    chunked, lags = check_chunks(), check_lags()
    say("check", cases=len(cases()), worst_relative_rms=worst, chunked=chunked, lags=lags)
    TABLE.append(f"worst relative RMS {worst:.2e}; in chunks {chunked:.2e}; 1024 lags {lags:.2e}")


def check_lags() -> float:
    """All 1024 lags of a longer prompt, against diagonals of the whole matrix."""
    tokens = 3001
    q, k = vectors(tokens, 4, 2)
    found = kernels.profile_sums(chunk_of(q, k, Attention(0.2), Tiling()), LAGS)
    products = 0.2 * q.double() @ k.double().repeat_interleave(2, 0).mT
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device="cuda").tril()
    weights = products.masked_fill(~causal, -torch.inf).softmax(-1)
    worst = 0.0
    for name, matrix in (("lag_attention", weights), ("lag_logits", products)):
        sums = [matrix.diagonal(-lag, 1, 2).sum(-1) for lag in range(LAGS)]
        worst = max(worst, relative_rms(found[name], torch.stack(sums, -1).cpu()))
    return worst


def check_chunks() -> float:
    """A prompt in pieces, with the query before each."""
    q, k = vectors(901, 4, 2)
    worst = 0.0
    for attention in (Attention(0.1), Attention(0.1, window=300)):
        expected = attention_profile_reference(q.cpu(), k.cpu(), attention, 130)
        total: dict[str, Tensor] = {}
        for start in range(0, 901, 400):
            end = min(start + 400, 901)
            low, first = max(start - 1, 0), max(0, start - 300) if attention.window else 0
            chunk = chunk_of(
                q[:, low:end], k[:, first:end], attention, Tiling(), query_start=start,
                key_start=first, has_previous=start > 0,
            )  # fmt: skip
            for name, x in kernels.profile_sums(chunk, 130).items():
                before = total.get(name, torch.zeros_like(x))
                pad = x.shape[-1] - before.shape[-1] if x.dim() == 2 else 0
                total[name] = x + torch.nn.functional.pad(before, (0, pad))
        worst = max(worst, *(relative_rms(x, getattr(expected, n)) for n, x in total.items()))
    return worst


def check_similarity() -> None:
    theta = 500000.0 ** (-torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)
    i = torch.arange(DIM)
    rotary = RotaryChannels(i[: DIM // 2], i[DIM // 2 :], theta, i[:0])
    tokens, start, worst = 5003, 1000, 0.0
    q, _ = vectors(tokens, 3, 1)
    q = q + torch.randn(3, 1, DIM, device="cuda", dtype=q.dtype)
    post = q.cpu().float()
    pre = rotary.unrotate(post, torch.arange(start, start + tokens))
    expected = SelfSimilarity()
    expected.add(pre, post)
    streams = expected._streams
    for name, tiles in STEPS.items():
        with attempt(f"check similarity {name}"):
            found = vector_sums(q, slice(0, 64, 1), slice(64, 128, 1), theta.cuda(), start, tiles)
            pairs = {
                "post": (found.post, streams["post"].total),
                "pre": (found.pre, streams["pre"].total),
                "squares": (found.squares, streams["post"].squares),
                "adjacent_post": (found.adjacent_post, streams["post"].adjacent),
                "adjacent_pre": (found.adjacent_pre, streams["pre"].adjacent),
                "vectors": (found.vectors, pre.double().sum(1)),
                "norms": (found.norms, rotary.norms(pre).double().sum(1)),
                "energies": (found.energies, rotary.by_channel(pre.double().square()).sum(1)),
            }
            errors = {k: relative_rms(*pair) for k, pair in pairs.items()}
            error = max(errors.values())
            worst = max(worst, error if error == error else float("inf"))
            if not error < 1e-3:
                say(f"check similarity {name}", errors=errors)
    say("check similarity", worst_relative_rms=worst)
    TABLE.append(f"worst relative RMS of similarity {worst:.2e}")


def flash(tokens: int, n: int = 5) -> float:
    """TFLOP/s of PyTorch's flash attention, forward, causal."""
    q, k = (x[None].contiguous() for x in vectors(tokens))
    v = torch.randn_like(k)
    flops = 2.0 * DIM * HEADS * tokens * tokens
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        ms = timed(
            f"flash {tokens}",
            lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
            flops,
            n=n,
        )
    return flops / ms / 1e9


def time_profile(tokens: int, left: Callable[[], float], n: int = 5) -> Tiling:
    """Every design on one layer; returns the fastest."""
    q, k = vectors(tokens)
    attention, one_pass = Attention(DIM**-0.5), 1.0 * DIM * HEADS * tokens * tokens
    best: dict[str, tuple[float, Any]] = {}

    def tried(kind: str, name: str, what: Any, run: Callable[[], object], flops: float) -> None:
        if left() < 40:
            return
        with attempt(f"{kind} {name}"):
            ms = timed(f"{kind} {tokens} {name}", run, flops, n=n)
            if kind not in best or ms < best[kind][0]:
                best[kind] = ms, what

    for name, tiles in ROWS.items():
        chunk = chunk_of(q, k, attention, Tiling(rows=tiles))
        tried("rows", name, tiles, lambda c=chunk: kernels.row_sums(c), one_pass)
    lse = kernels.row_sums(chunk_of(q, k, attention, Tiling()))[0]
    for name, (keep, tiles) in WEIGHTS.items():
        chunk = chunk_of(q, k, attention, Tiling(weights=tiles, keep=keep))
        run = lambda c=chunk: kernels.weight_sums(c, lse)  # noqa: E731
        tried("weights", name, (keep, tiles), run, one_pass)
    for name, tiles in BANDS.items():
        chunk = chunk_of(q, k, attention, Tiling(bands=tiles))
        tried("bands", name, tiles, lambda c=chunk: kernels.band_sums(c, lse, LAGS), 0)
    keep, weights = best["weights"][1]
    return Tiling(best["rows"][1], weights, best["bands"][1], keep)


def time_whole(tokens: int, tiling: Tiling, flash_rate: float, n: int = 5) -> None:
    """The whole profile: rate of both passes against flash attention, and extra memory."""
    q, k = vectors(tokens)
    attention, flops = Attention(DIM**-0.5), 2.0 * DIM * HEADS * tokens * tokens
    chunk = chunk_of(q, k, attention, tiling)
    ms = timed(f"profile {tokens}", lambda: kernels.profile_sums(chunk, LAGS), flops, n=n)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kernels.profile_sums(chunk, LAGS)
    extra = (torch.cuda.max_memory_allocated() - before) / 2**20
    share = flops / ms / 1e9 / flash_rate
    say(
        f"profile {tokens}",
        of_flash_rate=round(share, 3),
        extra_mib=round(extra),
        tiling=str(tiling),
    )
    TABLE.append(f"profile {tokens}: {share:.2f} of flash's rate, {extra:.0f} MiB extra, {tiling}")


def time_similarity(tokens: int) -> None:
    """Queries and keys of a layer in one pass each, against a copy of as many bytes."""
    q, k = vectors(tokens)
    nbytes = 2 * (q.numel() + k.numel())
    source = torch.randn(2**31 // 2, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy = timed("copy 2 GiB", lambda: target.copy_(source), nbytes=4 * source.numel(), n=11)
    rate = 4 * source.numel() / copy
    theta = 500000.0 ** (-torch.arange(0, DIM, 2, dtype=torch.float64, device="cuda") / DIM)
    halves = slice(0, 64, 1), slice(64, 128, 1)
    for name, tiles in STEPS.items():
        with attempt(f"similarity {name}"):

            def run(tiles: StepTiles = tiles) -> None:
                for x in (q, k):
                    vector_sums(x, *halves, theta, 0, tiles)

            run()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            ms = timed(f"similarity {tokens} {name}", graph.replay, nbytes=nbytes, n=11)
            say(f"similarity {tokens} {name}", of_copy=round(nbytes / ms / rate, 3))
            TABLE[-1] += f" of_copy={nbytes / ms / rate:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=210)
    parser.add_argument("--long", type=int, default=131072)
    parser.add_argument("--processes", type=int, default=12)
    options = parser.parse_args()
    start = time.perf_counter()

    def left() -> float:
        return options.seconds - (time.perf_counter() - start)

    say("machine", gpu=torch.cuda.get_device_name(), sink=SINK_TOKENS, **describe())
    check_similarity()
    check(options.processes)
    say("checked", seconds=round(time.perf_counter() - start, 1))
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    timed("matmul 8192", lambda: a @ a, 2 * 8192.0**3)
    rate = flash(32768)
    tiling = time_profile(32768, left)
    time_whole(32768, tiling, rate)
    say("timed 32k", seconds=round(time.perf_counter() - start, 1))
    time_similarity(32768)
    if left() > 15:
        time_similarity(131072)
    if left() > 15:
        long_rate = flash(options.long, n=3)
        time_whole(options.long, tiling, long_rate, n=3)
    say("done", seconds=round(time.perf_counter() - start, 1))
    print("\n".join(TABLE))


if __name__ == "__main__":
    main()
