"""`tappa eval` on many workers: each answers batches of samples in all cells, the driver writes.

A piece of work is a batch of samples of a task with all methods and budgets, because these share
the reading of the prompt. Workers make the samples themselves; a digest says that all have the
same ones.
"""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tappa.cluster.analyze import check_failed
from tappa.cluster.pool import Failed, InProcess, ModelSource, Pool, Worker, call
from tappa.cluster.progress import Follow, ignore
from tappa.errors import EvaluationError
from tappa.evaluation.evaluate import (
    Evaluation,
    Results,
    default_batch,
    evaluate,
    finish,
    identity_of,
    prepare,
)
from tappa.evaluation.grid import Outcome, alike, answer_batch, batches_of, describe_run, nobody
from tappa.evaluation.memory import Room
from tappa.evaluation.samples import Sample
from tappa.evaluation.shared_prefill import Cell, GridLM
from tappa.evaluation.store import (
    Record,
    SampleName,
    Say,
    check_prompts,
    missing_cells,
    note_asked,
    start_run,
    write_record,
)
from tappa.files import made_folder


@dataclass(frozen=True)
class _Grid:
    """What all pieces of work share."""

    source: ModelSource
    evaluation: Evaluation
    folder: Path
    batch: int | None


@dataclass(frozen=True)
class _Batch:
    """One piece of work: samples that lack the same cells."""

    grid: _Grid
    samples: list[SampleName]
    cells: list[Cell]


@dataclass(frozen=True)
class _Answers:
    """What came of it: what is written of each sample, what reading took, what is to be said."""

    records: list[Record]
    prefills: int
    prefill_seconds: float
    said: list[str]


def evaluate_grid(
    pool: Pool,
    evaluation: Evaluation,
    folder: Path,
    *,
    name: str = "",
    shard: tuple[int, int] = (0, 1),
    batch: int | None = None,
    follow: Follow = ignore,
    say: Say = nobody,
) -> Results:
    """`evaluate` by a pool: the same files in the folder, where kernels give the same numbers.

    Raises ClusterError for samples that failed, after the tables of all others are written, and
    what `evaluate` raises.
    """
    if isinstance(pool, InProcess):
        return evaluate(
            *(*pool.worker.model(pool.source), evaluation, folder),
            name=name,
            shard=shard,
            batch=batch,
            progress=lambda done, total: follow(done, total, 0, 0),
            say=say,
        )
    grid = _Grid(pool.source, evaluation, folder.absolute(), batch)
    with made_folder(folder):
        return _evaluate_elsewhere(pool, grid, folder, name, shard, follow, say)


def _evaluate_elsewhere(
    pool: Pool,
    grid: _Grid,
    folder: Path,
    name: str,
    shard: tuple[int, int],
    follow: Follow,
    say: Say,
) -> Results:
    cells, asked = grid.evaluation.cells(), grid.evaluation.asked()
    identity, run = call(pool, _describe, (grid, name))
    run |= {"workers": pool.workers}
    start_run(folder, identity, asked, run)
    batches: list[list[SampleName]] = call(pool, _prepare, grid)
    names = [one for part in batches for one in part]
    check_prompts(folder, names, asked)
    note_asked(folder, asked, run)
    missing = missing_cells(folder, names, cells, say)
    mine = batches[shard[0] :: shard[1]]
    work = [group for part in mine for group in alike([(one, missing[one]) for one in part])]
    jobs = {_name_of(some): _Batch(grid, some, of_cells) for some, of_cells in work}
    wanted, total = sum(len(job.samples) for job in jobs.values()), sum(map(len, mine))
    outcome = Outcome(cells=len(cells), found=total - wanted)
    failed = _answer_all(pool, jobs, folder, outcome, follow, say)
    lost = sum(len(jobs[one.name].samples) for one in failed)
    outcome.left = total - outcome.found - outcome.answered - lost
    if outcome.found + outcome.answered:
        results = finish(folder, grid.evaluation, outcome, names)
    check_failed(failed)
    if not outcome.found + outcome.answered:
        raise KeyboardInterrupt
    return results


def _answer_all(
    pool: Pool,
    jobs: dict[str, _Batch],
    folder: Path,
    outcome: Outcome,
    follow: Follow,
    say: Say,
) -> list[Failed]:
    failed: list[Failed] = []
    total = outcome.found + sum(len(job.samples) for job in jobs.values())
    follow(outcome.found, total, 0, 0)
    for done in pool.run(_answer, jobs):
        if isinstance(done, Failed):
            failed.append(done)
        else:
            answers, job = done.result, jobs[done.name]
            for sample, record in zip(job.samples, answers.records, strict=True):
                write_record(folder, sample, record)
            for line in answers.said:
                say(line)
            outcome.answered += len(job.samples)
            outcome.added += len(job.samples) if len(job.cells) < outcome.cells else 0
            outcome.prefills += answers.prefills
            outcome.prefill_seconds += answers.prefill_seconds
        follow(outcome.found + outcome.answered, total, len(failed), len(pool.retried))
    return failed


def _name_of(samples: list[SampleName]) -> str:
    numbers = ", ".join(str(sample.number) for sample in samples)
    return f"{samples[0].task} {numbers}"


def _describe(worker: Worker, payload: tuple[_Grid, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    grid, name = payload
    lm = _model(worker, grid)
    batch = grid.batch or default_batch(lm)
    return identity_of(lm, grid.evaluation, name), describe_run(lm) | {"batch": batch}


def _prepare(worker: Worker, grid: _Grid) -> list[list[SampleName]]:
    samples = list(_samples(worker, grid).values())
    batches = batches_of(samples, grid.batch or default_batch(_model(worker, grid)))
    return [[SampleName.of(sample) for sample in part] for part in batches]


def _answer(worker: Worker, job: _Batch) -> _Answers:
    lm, samples = _model(worker, job.grid), _samples(worker, job.grid)
    wanted = []
    for name in job.samples:
        if name not in samples:
            raise EvaluationError(
                f"a worker makes another sample {name.number} of {name.task} than the others: do "
                "all see the same data and the same Python?"
            )
        wanted.append(samples[name])
    prefills, seconds, said = lm.prefills, lm.prefill_seconds, list[str]()
    room: Room = worker.kept["room"]
    room.say = said.append
    records = answer_batch(lm, wanted, job.cells, room)
    return _Answers(records, lm.prefills - prefills, lm.prefill_seconds - seconds, said)


def _model(worker: Worker, grid: _Grid) -> GridLM:
    loaded = worker.model(grid.source)
    if "lm" not in worker.kept:
        worker.kept["lm"] = GridLM(loaded.model, loaded.tokenizer)
    found: GridLM = worker.kept["lm"]
    return found


def _samples(worker: Worker, grid: _Grid) -> dict[SampleName, Sample]:
    """All samples of the grid, made once by each worker: in its folder where it is seen."""
    lm = _model(worker, grid)
    if worker.kept.get("grid") != grid:
        folder = grid.folder / "tasks"
        if not (grid.folder / "grid.json").is_file():  # another machine, with disks of its own
            worker.kept["scratch"] = TemporaryDirectory(prefix="tappa-")
            folder = Path(worker.kept["scratch"].name)
        made = prepare(lm, grid.evaluation, folder)
        worker.kept["room"] = Room()
        worker.kept["samples"] = {SampleName.of(sample): sample for sample in made}
        worker.kept["grid"] = grid
    found: dict[SampleName, Sample] = worker.kept["samples"]
    return found
