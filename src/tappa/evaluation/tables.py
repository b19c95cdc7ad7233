"""From the files of a run to tables: means, errors, and paired differences from a baseline."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from tappa.errors import EvaluationError
from tappa.evaluation.shared_prefill import Cell
from tappa.evaluation.statistics import (
    average_of,
    holm,
    mean_of,
    paired_difference,
    stratified_difference,
)
from tappa.evaluation.store import Asked, Record, key_of, key_of_answer, read_record, sample_file

LOWER_IS_BETTER = {"kl", "nll", "attention_error"}
WEAK = 0.1  # a full cache below this score, or above chance by less, tells methods apart badly


@dataclass(frozen=True)
class Row:
    """A method at a budget (None: the full cache) in one table; differences are from a baseline."""

    method: str
    budget: float | None
    n: int
    mean: float
    error: float
    tokens_held: float
    nbytes: float
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_holm: float | None = None
    compress_seconds: float | None = None  # as in `Held`; not in files of before


@dataclass(frozen=True)
class Table:
    """One task, or the average over the tasks of a suite."""

    name: str
    metric: str
    lower_is_better: bool
    baseline: str
    rows: list[Row]
    warnings: list[str] = field(default_factory=list)


def read_samples(
    folder: Path, asked: Sequence[Asked] | None = None, cells: Sequence[Cell] | None = None
) -> pd.DataFrame:
    """One line for every sample, cell and score of the files below `folder/samples`.

    Of the samples `asked`, in `cells`, those that have an answer in all of them; without these
    arguments all that is there. What is damaged is left out.
    """
    if asked is None:
        paths = sorted((folder / "samples").glob("*/*.json"))
    else:
        paths = sorted(p for p in {sample_file(folder, one) for one in asked} if p.exists())
    records = [record for record in map(read_record, paths) if record is not None]
    lines = [line for record in records for line in _lines(record, cells)]
    if not lines:
        raise EvaluationError(f"no finished sample in {folder}")
    frame = pd.DataFrame(lines)
    for name in ("budget", "compress_seconds"):
        frame[name] = frame[name].astype(float)  # None becomes NaN
    return frame


def _lines(record: Record, cells: Sequence[Cell] | None) -> Iterator[dict[str, Any]]:
    answers = record["answers"]
    if cells is not None:
        by_key = {key_of_answer(answer): answer for answer in answers}
        keys = [key_of(cell.method, cell.budget) for cell in cells]
        if not all(key in by_key for key in keys):
            return
        answers = [by_key[k] | {"method": c.method} for k, c in zip(keys, cells, strict=True)]
    for answer in answers:
        shared = {key: record[key] for key in ("suite", "task", "number", "digest")}
        shared |= {k: answer[k] for k in ("method", "budget", "tokens_held", "nbytes")}
        shared["compress_seconds"] = answer.get("compress_seconds")
        for order, (metric, value) in enumerate(answer["scores"].items()):
            yield shared | {"metric": metric, "order": order, "value": value}


def tables_of(samples: pd.DataFrame, baseline: str, seed: int = 0) -> list[Table]:
    """A table for every task by its first metric, and one for every suite of several tasks.

    Differences are paired by sample, at the same budget. p-values are corrected by Holm over all
    differences of a table. Raises EvaluationError for an unknown baseline.
    """
    methods = list(dict.fromkeys(samples["method"]))
    if baseline not in methods:
        raise EvaluationError(f"expected a baseline out of {', '.join(methods)}, got {baseline!r}")
    first = samples[samples["order"] == 0]
    tables = []
    for suite, part in first.groupby("suite", sort=False):
        tasks = [(str(name), task) for name, task in part.groupby("task", sort=False)]
        tables += [_table(name, [task], baseline, seed) for name, task in tasks]
        if len(tasks) > 1 and part["metric"].map(_lower).nunique() == 1:
            name = f"{suite}: average of {len(tasks)} tasks"
            tables.append(_table(name, [task for _, task in tasks], baseline, seed))
    return tables


def _lower(metric: str) -> bool:
    return metric in LOWER_IS_BETTER


def _table(name: str, tasks: list[pd.DataFrame], baseline: str, seed: int) -> Table:
    everything = pd.concat(tasks)
    metrics = list(dict.fromkeys(everything["metric"]))
    rows = []
    for method, budget in _cells(everything):
        mine = [_values(task, method, budget) for task in tasks]
        mean = average_of(mine) if len(tasks) > 1 else mean_of(mine[0])
        at = _select(everything, method, budget)
        row = Row(
            method,
            budget,
            mean.n,
            mean.mean,
            mean.error,
            float(at["tokens_held"].mean()),
            float(at["nbytes"].mean()),
            compress_seconds=_seconds(at),
        )
        rows.append(_compared(row, mine, tasks, baseline, seed))
    corrected = iter(holm([row.p for row in rows if row.p is not None]))
    rows = [row if row.p is None else replace(row, p_holm=next(corrected)) for row in rows]
    metric = metrics[0] if len(metrics) == 1 else "score"
    found = Table(name, metric, _lower(metrics[0]), baseline, rows)
    return replace(found, warnings=list(_warnings(found)))


def _compared(
    row: Row, mine: list[list[float]], tasks: list[pd.DataFrame], baseline: str, seed: int
) -> Row:
    if row.method == baseline or (row.budget is None and baseline != "full"):
        return row
    theirs = [_values(task, baseline, row.budget, or_full=True) for task in tasks]
    if any(len(a) != len(b) for a, b in zip(mine, theirs, strict=True)):
        raise EvaluationError(f"{row.method} and {baseline} have answered different samples")
    if len(tasks) > 1:
        found = stratified_difference(mine, theirs, seed)
    else:
        found = paired_difference(mine[0], theirs[0], seed)
    return replace(row, difference=found.mean, low=found.low, high=found.high, p=found.p)


def _seconds(frame: pd.DataFrame) -> float | None:
    if "compress_seconds" not in frame or frame["compress_seconds"].isna().any():
        return None
    return float(frame["compress_seconds"].mean())


def _cells(frame: pd.DataFrame) -> Iterator[tuple[str, float | None]]:
    for method, budget in frame[["method", "budget"]].drop_duplicates().itertuples(index=False):
        yield str(method), None if math.isnan(budget) else float(budget)


def _select(frame: pd.DataFrame, method: str, budget: float | None) -> pd.DataFrame:
    at = frame["budget"].isna() if budget is None else frame["budget"] == budget
    return frame[(frame["method"] == method) & at]


def _values(
    frame: pd.DataFrame, method: str, budget: float | None, or_full: bool = False
) -> list[float]:
    chosen = _select(frame, method, budget)
    if or_full and chosen.empty:
        chosen = _select(frame, method, None)
    return chosen.sort_values("number")["value"].astype(float).tolist()


def _warnings(table: Table) -> Iterator[str]:
    """What makes a table say less than it seems to."""
    full = next((row for row in table.rows if row.budget is None), None)
    if full is None or table.lower_is_better:
        return
    if full.mean < WEAK:
        yield (
            f"{table.name}: the full cache scores {full.mean:.2f}: too low to tell methods apart "
            "(a stronger model, or shorter prompts?)"
        )
    elif full.mean > 0.99 and all(row.mean > 0.99 for row in table.rows):
        yield f"{table.name}: all methods are at the ceiling: choose smaller budgets"


def to_markdown(table: Table) -> str:
    """Methods × budgets: mean ± standard error (difference [95% interval]; p by Holm)."""
    budgets = list(dict.fromkeys(r.budget for r in table.rows if r.budget is not None))
    methods = list(dict.fromkeys(row.method for row in table.rows))
    by_cell = {(row.method, row.budget): row for row in table.rows}
    better = "lower" if table.lower_is_better else "higher"
    ns = sorted({row.n for row in table.rows})
    n = f"{ns[0]}" if len(ns) == 1 else f"{ns[0]}-{ns[-1]}"
    lines = [
        f"### {table.name}",
        "",
        f"{table.metric}, {better} is better, n = {n}; mean ± standard error (difference from "
        f"{table.baseline}, bootstrap 95% interval; permutation p, Holm-corrected)",
        "",
        "| method | " + " | ".join(f"@{budget:g}" for budget in budgets) + " |",
        "|---" * (len(budgets) + 1) + "|",
    ]
    for method in methods:
        cells = [by_cell.get((method, b)) or by_cell.get((method, None)) for b in budgets]
        lines.append(f"| {method} | " + " | ".join(map(_cell, cells)) + " |")
    lines += [f"\nwarning: {warning}" for warning in table.warnings]
    return "\n".join(lines) + "\n"


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    text = f"{row.mean:.3f}" + ("" if math.isnan(row.error) else f" ± {row.error:.3f}")
    if row.difference is None or row.low is None or row.high is None or row.p_holm is None:
        return text
    if math.isnan(row.low):  # one sample has no interval
        return f"{text} ({row.difference:+.3f})"
    p = "p < .001" if row.p_holm < 0.001 else f"p = {row.p_holm:.3f}".replace("0.", ".")
    return f"{text} ({row.difference:+.3f} [{row.low:+.3f}, {row.high:+.3f}]; {p})"


def memory_markdown(samples: pd.DataFrame) -> str:
    """What every cell held, tokens for each layer and KV head and bytes, and its time (`Held`)."""
    once = samples[samples["order"] == 0]
    head = "| method | budget | tokens held | KV MB | seconds to compress |"
    lines = ["### Memory and time", "", head, "|---" * 5 + "|"]
    for method, budget in _cells(once):
        at = _select(once, method, budget)
        size = "" if budget is None else f"{budget:g}"
        held, megabytes = at["tokens_held"].mean(), at["nbytes"].mean() / 1e6
        seconds = _seconds(at)
        time = "" if seconds is None else f"{seconds:.3f}"
        lines.append(f"| {method} | {size} | {held:.1f} | {megabytes:.2f} | {time} |")
    return "\n".join(lines) + "\n"


def as_json(tables: Sequence[Table]) -> list[dict[str, Any]]:
    """Tables as plain data; NaN, which JSON has not, becomes None."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, list):
            return [plain(v) for v in value]
        return None if isinstance(value, float) and math.isnan(value) else value

    return [plain(asdict(table)) for table in tables]
