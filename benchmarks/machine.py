"""What every benchmark says about where it ran, and how it measures."""

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers


def describe() -> dict[str, Any]:
    """Machine, versions and commit."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
    }


def cpu() -> str:
    """The processor's name where Linux tells it, else its architecture."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def peak_mb() -> float:
    """Peak resident size of this process so far (Linux).

    Not `getrusage`, whose peak a process takes over from the one that started it.
    """
    status = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))


def in_fresh_process(code: str) -> float:
    """The number that Python code prints last, run next to the benchmarks."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=sys.path[0], capture_output=True, text=True, check=True)
    return round(float(done.stdout.split()[-1]), 1)


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def ratios(slow: Callable[[], object], fast: Callable[[], object], n: int) -> dict[str, Any]:
    """Time two functions in turns, after one call of each to warm up: `slow / fast`, n times."""
    slow(), fast()
    pairs = [(seconds(slow), seconds(fast)) for _ in range(n)]
    values = sorted(a / b for a, b in pairs)
    return {
        "ratio_median": round(statistics.median(values), 3),
        "ratio_min": round(values[0], 3),
        "ratio_max": round(values[-1], 3),
        "seconds_median": [
            round(statistics.median(column), 4) for column in zip(*pairs, strict=True)
        ],
        "n": n,
    }
