"""Methods × budgets × samples: every sample is one file, and the folder is the state of the run."""

import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

import tappa
from tappa.errors import EvaluationError
from tappa.evaluation.samples import Sample, answer
from tappa.evaluation.shared_prefill import Cell, GridLM, Held
from tappa.files import difference, digest_of, ensure_folder, write_atomic
from tappa.interrupts import finish_first

SCHEMA = 1
Progress = Callable[[int, int], None]


@runtime_checkable
class Asked(Protocol):
    """What names a sample: a Sample, or its name alone where the sample is elsewhere."""

    @property
    def task(self) -> str: ...
    @property
    def number(self) -> int: ...
    @property
    def digest(self) -> str: ...


@dataclass
class Outcome:
    """What a run did: samples that were answered now, found on disk, and left by an interrupt."""

    answered: int = 0
    found: int = 0
    left: int = 0
    prefill_seconds: float = 0.0
    prefills: int = 0
    cells: int = 0

    @property
    def seconds_saved(self) -> float:
        """Time that reading every prompt again for each cell would have taken on top."""
        return self.prefill_seconds * (self.cells - 1)


def run_grid(
    lm: GridLM,
    samples: Sequence[Sample],
    cells: Sequence[Cell],
    folder: Path,
    *,
    shard: tuple[int, int] = (0, 1),
    batch: int = 1,
    progress: Progress | None = None,
) -> Outcome:
    """Answer every sample in every cell; `folder/samples/TASK/NUMBER.json` has the answers.

    Each file is written at once when its sample is done. Those that are there are kept, so that a
    run that was killed goes on where it was. `batch` samples of a task are answered together.
    `shard` (k, n) takes every n-th batch from the k-th: n processes may fill one folder together.
    At the first interrupt the batch at hand is finished, at the second all stops at once.

    Raises EvaluationError for a file of another grid, OutputError where none can be written.
    """
    batches = batches_of(samples, batch)[shard[0] :: shard[1]]
    total, done = sum(map(len, batches)), 0
    outcome = Outcome(cells=len(cells))
    lm.cells = list(cells)
    with finish_first() as interrupted:
        for samples_at_hand in batches:
            if progress is not None:
                progress(done, total)
            missing = []
            for sample in samples_at_hand:
                path = sample_file(folder, sample)
                if path.exists():
                    check_sample(path, sample, cells)
                    outcome.found += 1
                else:
                    missing.append(sample)
            if interrupted():
                outcome.left += len(missing)
                continue
            if missing:
                for sample, record in zip(missing, answer_batch(lm, missing, cells), strict=True):
                    write_sample(folder, sample, record)
                outcome.answered += len(missing)
            done += len(samples_at_hand)
    if progress is not None:
        progress(total - outcome.left, total)
    outcome.prefill_seconds, outcome.prefills = lm.prefill_seconds, lm.prefills
    return outcome


def sample_file(folder: Path, sample: Asked) -> Path:
    """Where the answers to a sample are."""
    return folder / "samples" / sample.task / f"{sample.number:05}.json"


def write_sample(folder: Path, sample: Asked, record: dict[str, Any]) -> None:
    """Write the answers to a sample, atomically. Raises OutputError."""
    path = sample_file(folder, sample)
    ensure_folder(path.parent)
    write_atomic(path, json.dumps(record))


def check_sample(path: Path, sample: Asked, cells: Sequence[Cell]) -> None:
    """Whether a file holds the answers to this sample in these cells. Raises EvaluationError."""
    record = read_json(path)
    if record.get("digest") != sample.digest:
        raise EvaluationError(f"{path} answers another prompt: choose another output folder")
    there = [(answer["method"], answer["budget"]) for answer in record["answers"]]
    if there != [(cell.method, cell.budget) for cell in cells]:
        raise EvaluationError(f"{path} has other methods or budgets: choose another output folder")


def batches_of(samples: Sequence[Sample], size: int) -> list[list[Sample]]:
    """Samples of one task together, in the order in which their first ones come."""
    open_ones: dict[str, list[Sample]] = {}
    batches: list[list[Sample]] = []
    for sample in samples:
        if len(open_ones.get(sample.task, [None] * size)) == size:
            open_ones[sample.task] = []
            batches.append(open_ones[sample.task])
        open_ones[sample.task].append(sample)
    return batches


def answer_batch(
    lm: GridLM, samples: Sequence[Sample], cells: Sequence[Cell]
) -> list[dict[str, Any]]:
    """What is written of samples that are answered together; times are those of one of them."""
    lm.forget()
    start, before = time.perf_counter(), lm.prefill_seconds
    try:
        found = answer(samples, lm, cells)
    except torch.OutOfMemoryError as error:
        raise EvaluationError(
            f"out of memory in {samples[0].task} {samples[0].number}: {str(error)[:200]}; "
            "choose a smaller --batch"
        ) from error
    prefill = lm.prefill_seconds - before
    rest = time.perf_counter() - start - prefill
    held = lm.held
    lm.forget()
    return [
        {
            "schema": SCHEMA,
            "suite": sample.suite,
            "task": sample.task,
            "number": sample.number,
            "digest": sample.digest,
            "prefill_seconds": round(prefill / len(samples), 4),
            "cells_seconds": round(rest / len(samples), 4),
            "answers": [
                asdict(cell) | one | _means(held.get(cell, []))
                for cell, one in zip(cells, answers, strict=True)
            ],
        }
        for sample, answers in zip(samples, found, strict=True)
    ]


def _means(caches: list[Held]) -> dict[str, float]:
    """Means over the prompts of a sample."""
    held, nbytes, seconds = (
        sum(values) / max(len(caches), 1) for values in zip(*caches or [Held(0, 0, 0)], strict=True)
    )
    return {
        "tokens_held": round(held, 3),
        "nbytes": round(nbytes),
        "compress_seconds": round(seconds, 5),
    }


def start_run(folder: Path, identity: dict[str, Any], run: dict[str, Any]) -> None:
    """Write `grid.json`: what decides the answers (identity), and how they came about (run).

    Raises EvaluationError where the folder has answers of another grid, naming what differs.
    """
    ensure_folder(folder)
    path = folder / "grid.json"
    if path.exists() and any((folder / "samples").glob("*/*.json")):
        known = read_json(path).get("identity", {})
        if found := difference(known, identity):
            raise EvaluationError(
                f"{folder} holds results of another grid: {found}; choose another output folder"
            )
        return
    write_atomic(path, json.dumps({"schema": SCHEMA, "identity": identity, "run": run}, indent=1))


def describe_run(lm: GridLM) -> dict[str, Any]:
    """Versions, commit, device and time: what a reader needs to judge the results."""
    packages = ("torch", "transformers", "lm_eval", "datasets", "scipy", "numpy")
    device = lm.device
    cuda = device.type == "cuda"
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"tappa": tappa.__version__} | {name: version(name) for name in packages},
        "python": platform.python_version(),
        "commit": _commit(),
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "attention": lm.model.config._attn_implementation,
        "chat_template": digest_of(lm.tokenizer.chat_template),
    }


def read_json(path: Path) -> dict[str, Any]:
    """The content of a file of a run. Raises EvaluationError for what is not one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"cannot read {path}: {error}") from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise EvaluationError(f"expected results of this version of tappa in {path}")
    return found


def _commit() -> str | None:
    """The commit of the source tree, if tappa runs out of one."""
    here = Path(__file__).parent
    git = shutil.which("git")
    if git is None:
        return None
    done = subprocess.run(
        [git, "-C", os.fspath(here), "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or None
