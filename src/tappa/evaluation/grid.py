"""Methods × budgets × samples: every sample is one file, and the folder is the state of the run."""

import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import tappa
from tappa.evaluation.memory import Room, free_memory, is_out_of_memory
from tappa.evaluation.samples import Sample, answer
from tappa.evaluation.shared_prefill import Cell, GridLM, Held
from tappa.evaluation.store import (
    SCHEMA,
    Record,
    SampleName,
    Say,
    as_answer,
    joined,
    missing_cells,
    write_record,
)
from tappa.files import digest_of
from tappa.interface import implementation_of
from tappa.interrupts import finish_first

Progress = Callable[[int, int], None]


def nobody(text: str) -> None:
    """Nobody listens."""


@dataclass
class Outcome:
    """What a run did: samples answered now, found on disk, left by an interrupt.

    `added` of the answered ones had a file, which lacked some cells.
    """

    answered: int = 0
    added: int = 0
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
    say: Say = nobody,
) -> Outcome:
    """Answer every sample in every cell; `folder/samples/TASK/NUMBER.json` has the answers.

    Each file is written at once when its sample is done. Answers that are there are kept and only
    missing ones made, so that a run that was killed, or that is asked for more, goes on where it
    was. `batch` samples of a task are answered together, fewer where memory does not suffice.
    `shard` (k, n) takes every n-th batch from the k-th: n processes may fill one folder together.
    At the first interrupt the batch at hand is finished, at the second all stops at once.

    Raises EvaluationError for a file of another prompt, OutputError where none can be written.
    """
    missing = missing_cells(folder, samples, cells, say)
    batches = batches_of(samples, batch)[shard[0] :: shard[1]]
    total, done = sum(map(len, batches)), 0
    outcome, room = Outcome(cells=len(cells)), Room(say)
    with finish_first() as interrupted:
        for at_hand in batches:
            if progress is not None:
                progress(done, total)
            work = alike([(sample, missing[SampleName.of(sample)]) for sample in at_hand])
            outcome.found += len(at_hand) - sum(len(some) for some, _ in work)
            if interrupted():
                outcome.left += sum(len(some) for some, _ in work)
                continue
            for some, of_cells in work:
                for sample, record in zip(
                    some, answer_batch(lm, some, of_cells, room), strict=True
                ):
                    write_record(folder, sample, record)
                outcome.answered += len(some)
                outcome.added += len(some) if len(of_cells) < len(cells) else 0
            done += len(at_hand)
    if progress is not None:
        progress(total - outcome.left, total)
    outcome.prefill_seconds, outcome.prefills = lm.prefill_seconds, lm.prefills
    return outcome


def alike(wanted: Sequence[tuple[Any, list[Cell]]]) -> list[tuple[list[Any], list[Cell]]]:
    """Samples that lack the same cells together; those that lack none are left out."""
    groups: dict[tuple[Cell, ...], list[Any]] = {}
    for sample, cells in wanted:
        if cells:
            groups.setdefault(tuple(cells), []).append(sample)
    return [(samples, list(cells)) for cells, samples in groups.items()]


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
    lm: GridLM, samples: Sequence[Sample], cells: Sequence[Cell], room: Room
) -> list[Record]:
    """What is written of samples of a task, answered together as far as there is room.

    Raises EvaluationError where one sample in one cell is too much.
    """
    task = samples[0].task
    parts = room.parts(task, samples, cells)
    if len(parts) == 1:
        found = _answer_together(lm, samples, cells, room)
        if found is not None:
            return found
        free_memory()
        parts = room.parts(task, samples, cells)
    records: dict[int, list[Record]] = {}
    for some, of_cells in parts:
        for sample, record in zip(some, answer_batch(lm, some, of_cells, room), strict=True):
            records.setdefault(sample.number, []).append(record)
    return [joined(records[sample.number]) for sample in samples]


def _answer_together(
    lm: GridLM, samples: Sequence[Sample], cells: Sequence[Cell], room: Room
) -> list[Record] | None:
    """None where memory did not suffice; times are those of one of the samples."""
    lm.forget()
    lm.cells = list(cells)
    start, before = time.perf_counter(), lm.prefill_seconds
    try:
        found = answer(samples, lm, cells)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        room.shrink(samples[0].task, len(samples), len(cells), error)
        return None
    finally:
        held = lm.held
        lm.forget()
    prefill = lm.prefill_seconds - before
    rest = time.perf_counter() - start - prefill
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
                as_answer(cell, one, _means(held.get(cell, [])))
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
        "attention": implementation_of(lm.model.config),
        "chat_template": digest_of(lm.tokenizer.chat_template),
    }


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
