"""Analysis of SmolLM2 by 1 and 2 local workers: efficiency, start, overhead of a piece of work."""

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from machine import describe, seconds

from tappa.analysis import analyze_prompts
from tappa.cluster import InProcess, ModelSource, Placement, Pool, analyze_texts
from tappa.cluster.analyze import read_sums, write_sums
from tappa.cluster.pool import Worker
from tappa.cluster.ray_pool import RayPool
from tappa.layer_statistics import Settings
from tappa.texts import encode_texts, packaged_text

TEXTS, TOKENS, RUNS, TASKS = 8, 256, 3, 200
SOURCE = ModelSource(device="cpu")


def nothing(worker: Worker, payload: int) -> int:
    """A piece of work that takes no time."""
    return payload


def texts() -> list[str]:
    """Pieces of the packaged text, each longer than TOKENS."""
    return [packaged_text()[start * 4000 :][:4000] for start in range(TEXTS)]


def analyses(pool: Pool) -> list[float]:
    """Seconds of the whole job into a new folder, RUNS times, workers warm."""
    found = []
    for _ in range(RUNS + 1):
        with tempfile.TemporaryDirectory() as folder:
            found.append(
                seconds(
                    lambda at=folder: analyze_texts(pool, texts(), tokens=TOKENS, folder=Path(at))
                )
            )
    return [round(x, 3) for x in found[1:]]


def on_ray(workers: int) -> dict[str, Any]:
    """Start, the job, and tasks that do nothing."""
    pools: list[RayPool] = []
    start = seconds(lambda: pools.append(RayPool(SOURCE, Placement(workers))))
    pool = pools[0]
    try:
        first = seconds(lambda: list(pool.run(nothing, {"a": 0})))
        job = analyses(pool)
        empty = seconds(lambda: list(pool.run(nothing, {str(n): n for n in range(TASKS)})))
    finally:
        pool.close()
    return {
        "seconds": job,
        "cluster_start_seconds": round(start, 2),
        "first_worker_seconds": round(first, 2),
        "empty_task_ms": round(1000 * empty / TASKS, 2),
    }


def piece() -> dict[str, Any]:
    """What becomes of one shard's sums on the driver: bytes, and the time of each step."""
    model, tokenizer = SOURCE.load()
    prompts = encode_texts(tokenizer, texts()[:1], 64)
    sums = analyze_prompts(model, prompts, Settings())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sums"
        steps = {
            "write": lambda: write_sums(sums, path),
            "read": lambda: read_sums(path),
            "merge": lambda: sums.merge(sums),
        }
        times = {
            f"{name}_ms": round(1000 * statistics.median(seconds(step) for _ in range(9)), 1)
            for name, step in steps.items()
        }
        return {"sums_mb": round(path.stat().st_size / 1e6, 2)} | times


def main() -> None:
    torch.set_num_threads(1)  # as workers have by default
    alone = analyses(InProcess(SOURCE))
    one, two = on_ray(1), on_ray(2)
    base, single, double = (statistics.median(x) for x in (alone, one["seconds"], two["seconds"]))
    result = {
        "benchmark": "cluster",
        "model": "SmolLM2-135M-Instruct float32",
        "job": f"{TEXTS} texts of {TOKENS} tokens, one shard each",
        "n": RUNS,
        "in_process_seconds": alone,
        "ray_1_worker": one,
        "ray_2_workers": two,
        "overhead_of_a_shard_ms": round(1000 * (single - base) / TEXTS, 1),
        "efficiency_1": round(base / single, 3),
        "efficiency_2": round(base / (2 * double), 3),
        "piece": piece(),
    }
    print(json.dumps(result | describe()))


if __name__ == "__main__":
    main()
