"""The whole flow of `tappa eval`: samples, answers on disk, tables."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tappa.checkpoint import fingerprint
from tappa.errors import EvaluationError
from tappa.evaluation.grid import Outcome, Progress, describe_run, nobody, run_grid
from tappa.evaluation.samples import Sample
from tappa.evaluation.shared_prefill import Cell, GridLM, cells_of
from tappa.evaluation.store import Asked, Say, check_prompts, note_asked, start_run
from tappa.evaluation.suites import Source, check_names, known_tokens, samples_of
from tappa.evaluation.tables import (
    Table,
    as_json,
    memory_markdown,
    read_samples,
    tables_of,
    to_markdown,
)
from tappa.files import digest_of, made_folder, write_atomic

__all__ = [
    "METHODS",
    "Evaluation",
    "Results",
    "Source",
    "check_names",
    "describe_outcome",
    "evaluate",
]
METHODS = (
    *("full", "streaming_llm", "h2o", "snapkv", "pyramidkv", "cake", "tappa_paper", "tappa"),
)
BUDGETS = (128, 256, 512, 1024)
TASKS = ("fidelity",)


@dataclass(frozen=True)
class Evaluation:
    """What is to be evaluated. `baseline` (cake, or the first method) is what others are held to.

    `half` "tune" takes the samples of even number, "report" those of odd number: what was chosen on
    one half is to be judged on the other.
    """

    methods: Sequence[str] = METHODS
    budgets: Sequence[int | float] = BUDGETS
    tasks: Sequence[str] = TASKS
    source: Source = field(default_factory=Source)
    baseline: str | None = None
    half: str | None = None

    def cells(self) -> list[Cell]:
        """All methods × budgets. Raises CompressionError, EvaluationError."""
        if not self.methods or not self.budgets or not self.tasks:
            raise EvaluationError("expected at least one method, one budget and one task")
        if self.half not in (None, "tune", "report"):
            raise EvaluationError(f"expected half tune or report, got {self.half!r}")
        self.against()
        return cells_of(self.methods, self.budgets)

    def asked(self) -> dict[str, Any]:
        """All that is evaluated, for `grid.json`."""
        source = self.source
        return {
            "methods": list(self.methods),
            "budgets": list(self.budgets),
            "tasks": list(self.tasks),
            "half": self.half,
            "limit": source.limit,
            "lengths": list(source.lengths),
            "data": None if source.data is None else str(source.data),
        }

    def against(self) -> str:
        """The method that the others are compared with."""
        if self.baseline is None:
            return "cake" if "cake" in self.methods else self.methods[0]
        if self.baseline not in self.methods:
            raise EvaluationError(
                f"expected a baseline out of {', '.join(self.methods)}, got {self.baseline!r}"
            )
        return self.baseline


@dataclass(frozen=True)
class Results:
    """Tables of all that is finished, and what this run did for them."""

    tables: list[Table] = field(repr=False)
    outcome: Outcome
    markdown: str = field(repr=False)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    evaluation: Evaluation,
    folder: Path,
    *,
    name: str = "",
    shard: tuple[int, int] = (0, 1),
    batch: int | None = None,
    progress: Progress | None = None,
    say: Say = nobody,
) -> Results:
    """Answer all samples in all cells, and write tables.

    `folder` gets `grid.json` (what was asked, versions, device), `tasks/` (prompts), `samples/`
    (answers and scores of every sample), `samples.parquet` (the same as a table), `results.json`
    and `tables.md`. A folder that has some answers already gets the others, those of more samples,
    methods, budgets and tasks too; tables show what is asked for. `batch` samples of a task are
    answered together (by default 4 on a GPU, 1 elsewhere). `say` gets lines on damaged files and
    on memory that did not suffice.

        results = evaluate(model, tokenizer, Evaluation(tasks=["local"]), Path("results"))
        print(results.markdown)

    Raises TappaError of several kinds; answers that are written stay. KeyboardInterrupt where an
    interrupt left no sample.
    """
    cells = evaluation.cells()
    with made_folder(folder):
        lm = GridLM(model, tokenizer)
        batch = batch or default_batch(lm)
        asked, run = evaluation.asked(), describe_run(lm) | {"batch": batch}
        start_run(folder, identity_of(lm, evaluation, name), asked, run)
        samples = prepare(lm, evaluation, folder / "tasks")
        check_prompts(folder, samples, asked)
        note_asked(folder, asked, run)
        outcome = run_grid(
            lm, samples, cells, folder, shard=shard, batch=batch, progress=progress, say=say
        )
        if outcome.left and not outcome.answered + outcome.found:
            raise KeyboardInterrupt
        return finish(folder, evaluation, outcome, samples)


def default_batch(lm: GridLM) -> int:
    """Samples that are answered together."""
    return 4 if lm.device.type == "cuda" else 1


def identity_of(lm: GridLM, evaluation: Evaluation, name: str) -> dict[str, Any]:
    """What no folder mixes: all that decides answers but their prompts, methods and budgets."""
    model, source = cast(PreTrainedModel, lm.model), evaluation.source
    config = model.config.get_text_config()
    return {
        "model": name or type(model).__name__,
        "weights": fingerprint(model),
        "rope": getattr(config, "rope_parameters", None),
        "tokenizer": digest_of(known_tokens(lm)),
        "dtype": str(model.dtype).removeprefix("torch."),
        "seed": source.seed,
        "chat": source.chat,
        "template": digest_of(lm.tokenizer.chat_template) if source.chat else None,
    }


def prepare(lm: GridLM, evaluation: Evaluation, folder: Path) -> list[Sample]:
    """The samples in the order in which they are answered; task files go to the folder."""
    made = samples_of(evaluation.tasks, lm, evaluation.source, folder)
    once = {(sample.task, sample.number): sample for sample in made}  # `ruler,ruler_vt`
    samples = _half(list(once.values()), evaluation.half)
    samples.sort(key=lambda sample: sample.number)  # an early end finds all tasks equally far
    if not samples:
        raise EvaluationError("expected at least one sample, the tasks have none")
    return samples


def finish(
    folder: Path, evaluation: Evaluation, outcome: Outcome, samples: Sequence[Asked]
) -> Results:
    """Tables of those of the samples that have an answer in every cell."""
    frame = read_samples(folder, samples, evaluation.cells())
    tables = tables_of(frame, evaluation.against(), evaluation.source.seed)
    content: dict[str, Any] = {"schema": 1, "tables": as_json(tables)}
    markdown = "\n".join([*map(to_markdown, tables), memory_markdown(frame)])
    write_atomic(folder / "results.json", json.dumps(content, indent=1, allow_nan=False))
    write_atomic(folder / "samples.parquet", frame.drop(columns="order").to_parquet(index=False))
    write_atomic(folder / "tables.md", markdown)
    return Results(tables, outcome, markdown)


def describe_outcome(outcome: Outcome) -> str:
    """What a run did, in one or two lines."""
    text = f"{outcome.answered} samples answered, {outcome.found} were there already"
    if outcome.added:
        text += f"; {outcome.added} of those answered had some of the answers"
    if outcome.left:
        text += f", {outcome.left} left by the interrupt: run the same command to go on"
    if outcome.prefills:
        text += (
            f"\n{outcome.prefills} prompts read once for {outcome.cells} cells, in "
            f"{outcome.prefill_seconds:.1f} s: reading them for each cell would have taken about "
            f"{outcome.seconds_saved:.0f} s more"
        )
    return text


def _half(samples: list[Sample], half: str | None) -> list[Sample]:
    if half is None:
        return samples
    return [sample for sample in samples if sample.number % 2 == (half == "report")]
