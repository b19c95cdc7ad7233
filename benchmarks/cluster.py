"""Analysis of SmolLM2 by 1 and 2 local workers: efficiency, start, overhead of a piece of work.

Runs in turns, so that other work on the machine meets all alike.
"""

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import ray
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


def job(pool: Pool) -> float:
    """Seconds of the whole analysis into a new folder."""
    with tempfile.TemporaryDirectory() as folder:
        return seconds(lambda: analyze_texts(pool, texts(), tokens=TOKENS, folder=Path(folder)))


def in_turns(pools: dict[str, Pool]) -> dict[str, list[float]]:
    """Seconds of the job by each pool, RUNS times, one after the other; the first warms up."""
    rounds = [{name: job(pool) for name, pool in pools.items()} for _ in range(RUNS + 1)][1:]
    return {name: [round(one[name], 3) for one in rounds] for name in pools}


def empty_tasks(pool: Pool) -> float:
    """Milliseconds of a task that does nothing."""
    jobs = {str(n): n for n in range(TASKS)}
    return round(1000 * seconds(lambda: list(pool.run(nothing, jobs))) / TASKS, 2)


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
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    room: dict[str, Any] = {"num_cpus": 3, "object_store_memory": 2**28, "include_dashboard": False}
    start = seconds(lambda: ray.init("local", **room, **quiet))
    one, two = RayPool(SOURCE, Placement(1)), RayPool(SOURCE, Placement(2))
    first = seconds(lambda: list(one.run(nothing, {"a": 0})))
    times = in_turns({"in_process": InProcess(SOURCE), "ray_1": one, "ray_2": two})
    alone, single, double = (statistics.median(x) for x in times.values())
    result = {
        "benchmark": "cluster",
        "model": "SmolLM2-135M-Instruct float32",
        "job": f"{TEXTS} texts of {TOKENS} tokens, one shard each",
        "n": RUNS,
        "seconds": times,
        "overhead_of_a_shard_ms": round(1000 * (single - alone) / TEXTS, 1),
        "efficiency_1": round(alone / single, 3),
        "efficiency_2": round(alone / (2 * double), 3),
        "empty_task_ms": empty_tasks(one),
        "cluster_start_seconds": round(start, 2),
        "first_worker_seconds": round(first, 2),
        "piece": piece(),
    }
    one.close(), two.close()
    print(json.dumps(result | describe()))


if __name__ == "__main__":
    main()
