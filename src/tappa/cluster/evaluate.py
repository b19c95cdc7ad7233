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
from tappa.evaluation.grid import (
    Outcome,
    answer_batch,
    batches_of,
    check_sample,
    describe_run,
    sample_file,
    start_run,
    write_sample,
)
from tappa.evaluation.samples import Sample
from tappa.evaluation.shared_prefill import GridLM


@dataclass(frozen=True)
class SampleName:
    """A sample that is made elsewhere."""

    task: str
    number: int
    digest: str


@dataclass(frozen=True)
class _Grid:
    """What all pieces of work share."""

    source: ModelSource
    evaluation: Evaluation
    folder: Path
    batch: int | None


@dataclass(frozen=True)
class _Batch:
    """One piece of work."""

    grid: _Grid
    samples: list[SampleName]


@dataclass(frozen=True)
class _Answers:
    """What came of it: what is written of each sample, and what reading the prompts took."""

    samples: list[SampleName]
    records: list[dict[str, Any]]
    prefills: int
    prefill_seconds: float


def evaluate_grid(
    pool: Pool,
    evaluation: Evaluation,
    folder: Path,
    *,
    name: str = "",
    shard: tuple[int, int] = (0, 1),
    batch: int | None = None,
    follow: Follow = ignore,
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
        )
    cells = evaluation.cells()
    grid = _Grid(pool.source, evaluation, folder.absolute(), batch)
    identity, run = call(pool, _describe, (grid, name))
    start_run(folder, identity, run | {"workers": pool.workers})
    batches: list[list[SampleName]] = call(pool, _prepare, grid)[shard[0] :: shard[1]]
    outcome = Outcome(cells=len(cells))
    jobs = {}
    for samples in batches:
        missing = [s for s in samples if not sample_file(folder, s).exists()]
        for sample in samples:
            if sample not in missing:
                check_sample(sample_file(folder, sample), sample, cells)
        outcome.found += len(samples) - len(missing)
        if missing:
            jobs[_name_of(missing)] = _Batch(grid, missing)
    failed = _answer_all(pool, jobs, folder, outcome, follow)
    total = sum(map(len, batches))
    lost = sum(len(jobs[one.name].samples) for one in failed)
    outcome.left = total - outcome.found - outcome.answered - lost
    if outcome.found + outcome.answered:
        results = finish(folder, evaluation, outcome)
    check_failed(failed)
    if not outcome.found + outcome.answered:
        raise KeyboardInterrupt
    return results


def _answer_all(
    pool: Pool, jobs: dict[str, _Batch], folder: Path, outcome: Outcome, follow: Follow
) -> list[Failed]:
    failed: list[Failed] = []
    total = outcome.found + sum(len(job.samples) for job in jobs.values())
    follow(outcome.found, total, 0, 0)
    for done in pool.run(_answer, jobs):
        if isinstance(done, Failed):
            failed.append(done)
        else:
            answers: _Answers = done.result
            for sample, record in zip(answers.samples, answers.records, strict=True):
                write_sample(folder, sample, record)
            outcome.answered += len(answers.samples)
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
    return [[SampleName(s.task, s.number, s.digest) for s in part] for part in batches]


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
    lm.cells = job.grid.evaluation.cells()
    prefills, seconds = lm.prefills, lm.prefill_seconds
    records = answer_batch(lm, wanted, lm.cells)
    return _Answers(job.samples, records, lm.prefills - prefills, lm.prefill_seconds - seconds)


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
        worker.kept["samples"] = {SampleName(s.task, s.number, s.digest): s for s in made}
        worker.kept["grid"] = grid
    found: dict[SampleName, Sample] = worker.kept["samples"]
    return found
