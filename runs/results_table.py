"""Short tables of `tappa eval` folders, from `samples.parquet` alone: what the README shows.

    python runs/results_table.py FOLDER ... [--baseline cake] [--methods tappa,cake,snapkv]

For each folder the average over its tasks (of one task: that task) and, in brackets, the 95%
interval of the paired difference from the baseline (bootstrap), bold where p < .05 (permutation
test, Holm over all differences of the folder's table). Best first, by the mean over budgets.
"""

import argparse
import math
from pathlib import Path

import pandas as pd

from tappa.evaluation.tables import Row, Table, tables_of


def last_table(folder: Path, baseline: str) -> tuple[Table, str]:
    """The average over all tasks, and how many samples each of them has."""
    samples = pd.read_parquet(folder / "samples.parquet")
    cell = ["task", "number", "method", "budget"]
    samples["order"] = samples.groupby(cell, dropna=False).cumcount()
    tables = tables_of(samples, baseline)
    sizes = sorted({row.n for table in tables for row in table.rows if "average" not in table.name})
    total = tables[-1].rows[0].n
    each = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    return tables[-1], f"n = {total}" + ("" if len(tables) == 1 else f", {each} a task")


def signed(value: float) -> str:
    return f"{value:+.3f}".replace("0.", ".", 1).replace("-", "−")


def cell(row: Row) -> str:
    mean = f"{row.mean:.3f}".replace("0.", ".", 1)
    if row.low is None or row.high is None or row.p_holm is None or math.isnan(row.low):
        return mean
    interval = f"{signed(row.low)} to {signed(row.high)}"
    return f"{mean} ({f'**{interval}**' if row.p_holm < 0.05 else interval})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--baseline", default="cake")
    parser.add_argument("--methods", help="only these, comma-separated")
    options = parser.parse_args()
    for folder in options.folders:
        table, n = last_table(folder, options.baseline)
        by_method: dict[str, list[Row]] = {}
        for row in table.rows:
            by_method.setdefault(row.method, []).append(row)
        budgets = list(dict.fromkeys(r.budget for r in table.rows if r.budget is not None))
        sign = 1 if table.lower_is_better else -1

        def quality(rows: list[Row], sign: int = sign) -> float:
            return sign * sum(row.mean for row in rows) / len(rows)

        order = sorted(by_method, key=lambda m: (m != "full", quality(by_method[m])))
        print(f"| {folder.name} ({n}) | " + " | ".join(f"{b:g}" for b in budgets) + " |")
        print("|---" * (len(budgets) + 1) + "|")
        for method in order:
            if options.methods and method not in options.methods.split(","):
                continue
            rows = by_method[method]
            cells = [cell(rows[i if len(rows) > 1 else 0]) for i in range(len(budgets))]
            print(f"| {method} | " + " | ".join(cells) + " |")
        worst = max((r.p_holm for r in by_method["tappa"] if r.p_holm is not None), default=None)
        if worst is not None:
            ps = ", ".join(f"{r.p_holm:.4f}" for r in by_method["tappa"] if r.p_holm is not None)
            print(f"\ntappa against {options.baseline}: p = {ps}\n")


if __name__ == "__main__":
    main()
