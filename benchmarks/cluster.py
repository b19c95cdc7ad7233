"""Analysis of SmolLM2 by 1 and 2 local workers: efficiency, start, overhead of a piece of work.

Runs in turns, so that other work on the machine meets all alike. Prints the table of docs/scale.md,
then one JSON line. Two to five minutes; for two workers to be twice as fast it needs two cores that
do nothing else.
"""

import json
import os
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
from tappa.files import write_atomic
from tappa.layer_statistics import Settings
from tappa.texts import encode_texts, packaged_text

TEXTS, TOKENS, RUNS, TASKS = 8, 256, 3, 200
ANSWERS = 4000  # bytes of what is written of a sample
SOURCE = ModelSource(device="cpu")


def nothing(worker: Worker, payload: int) -> int:
    """A piece of work that takes no time."""
    return payload


def texts() -> list[str]:
    """Pieces of the packaged text, each longer than TOKENS."""
    return [packaged_text()[start * 4000 :][:4000] for start in range(TEXTS)]


def job(pool: Pool, tokens: int = TOKENS) -> float:
    """Seconds of the whole analysis into a new folder."""
    with tempfile.TemporaryDirectory() as folder:
        return seconds(lambda: analyze_texts(pool, texts(), tokens=tokens, folder=Path(folder)))


def in_turns(pools: dict[str, Pool]) -> dict[str, list[float]]:
    """Seconds of the job by each pool, RUNS times, one after the other."""
    for pool in pools.values():
        job(pool, 32)  # every worker loads the model
    rounds = [{name: job(pool) for name, pool in pools.items()} for _ in range(RUNS)]
    return {name: [round(one[name], 3) for one in rounds] for name in pools}


def empty_tasks(pool: Pool) -> float:
    """Milliseconds of a task that does nothing."""
    jobs = {str(n): n for n in range(TASKS)}
    return round(1000 * seconds(lambda: list(pool.run(nothing, jobs))) / TASKS, 2)


def on_driver() -> dict[str, float]:
    """What becomes of one shard's sums, and of one sample's answers: bytes, and ms of each step."""
    model, tokenizer = SOURCE.load()
    prompts = encode_texts(tokenizer, texts()[:1], 64)
    sums = analyze_prompts(model, prompts, Settings())
    with tempfile.TemporaryDirectory() as folder:
        path, sample = Path(folder) / "sums", Path(folder) / "sample"
        steps = {
            "write": lambda: write_sums(sums, path),
            "read": lambda: read_sums(path),
            "merge": lambda: sums.merge(sums),
            "sample": lambda: write_atomic(sample, "x" * ANSWERS),
        }
        times = {
            f"{name}_ms": round(1000 * statistics.median(seconds(step) for _ in range(9)), 1)
            for name, step in steps.items()
        }
        return {"sums_mb": round(path.stat().st_size / 1e6, 2)} | times


def spread(values: list[float], digits: int = 1) -> str:
    """`median (least to most)`."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def table(found: dict[str, Any]) -> str:
    """The figures as docs/scale.md has them."""
    times, driver = found["seconds"], found["on_driver"]
    rows = {
        f"what (n = {RUNS}, in turns; median, least to most)": "measured",
        "---": "---",
        "the job in process, seconds": spread(times["in_process"]),
        "by 1 worker of Ray": spread(times["ray_1"]),
        "by 2 workers": spread(times["ray_2"]),
        "efficiency of 1 worker (in process ÷ 1 worker)": spread(found["efficiency_1"], 2),
        "efficiency of 2 (in process ÷ 2 × 2 workers)": spread(found["efficiency_2"], 2),
        f"a task that does nothing (mean of {TASKS})": f"{found['empty_task_ms']} ms",
        f"sums of a shard on the driver, {driver['sums_mb']} MB: write and flush, read, merge": (
            f"{driver['write_ms']}, {driver['read_ms']} and {driver['merge_ms']} ms (medians of 9)"
        ),
        f"answers to a sample on the driver, {ANSWERS / 1000:g} kB: write and flush": (
            f"{driver['sample_ms']} ms (median of 9)"
        ),
        "Ray starts on this machine; then the first worker is there, imports included": (
            f"{found['cluster_start_seconds']} s; {found['first_worker_seconds']} s (n = 1)"
        ),
    }
    return "\n".join(f"| {what} | {value} |" for what, value in rows.items())


def main() -> None:
    torch.set_num_threads(1)  # as workers have by default
    load = os.getloadavg()[0]
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    room: dict[str, Any] = {"num_cpus": 3, "object_store_memory": 2**28, "include_dashboard": False}
    start = seconds(lambda: ray.init("local", **room, **quiet))
    one = RayPool(SOURCE, Placement(1))
    first = seconds(lambda: list(one.run(nothing, {"a": 0})))
    two = RayPool(SOURCE, Placement(2))
    times = in_turns({"in_process": InProcess(SOURCE), "ray_1": one, "ray_2": two})
    pairs = list(zip(*times.values(), strict=True))
    found = {
        "benchmark": "cluster",
        "model": "SmolLM2-135M-Instruct float32",
        "job": f"{TEXTS} texts of {TOKENS} tokens, one shard each",
        "n": RUNS,
        "load_before": round(load, 2),
        "seconds": times,
        "efficiency_1": [round(alone / single, 3) for alone, single, _ in pairs],
        "efficiency_2": [round(alone / (2 * double), 3) for alone, _, double in pairs],
        "empty_task_ms": empty_tasks(one),
        "cluster_start_seconds": round(start, 2),
        "first_worker_seconds": round(first, 2),
        "on_driver": on_driver(),
    }
    one.close()
    two.close()
    ray.shutdown()
    print(table(found))
    print(json.dumps(found | describe()))


if __name__ == "__main__":
    main()
