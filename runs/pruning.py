"""What removing layers or heads costs, by every order: perplexity and multiple choice.

    python runs/pruning.py run MODEL --out results.jsonl [--device cuda --dtype bfloat16] ...
    python runs/pruning.py table results.jsonl ...
    python runs/pruning.py short results.jsonl ...

`run` calibrates on the first half of the packaged text (windows of 1024 tokens, stride 256), and
writes one JSON line for each order and share of layers (or of query heads) removed: what is gone,
the mean -log p of each window of the second half, and of each multiple-choice question (suite
`choice` of `tappa eval`, through lm-evaluation-harness, `acc_norm`) whether it was answered right.
Lines that are there are kept; what two orders both remove is measured once. Nothing is trained.

`table` prints Markdown: perplexity, accuracy, paired differences from the order `bi` (of heads:
from random ones, seed 0) with bootstrap 95% intervals and permutation tests, Holm-corrected.
`short` prints one table of layers, where + and − say what is better and worse than `bi`.
"""

import argparse
import itertools
import json
import logging
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tappa
from tappa.evaluation.choice_suite import write_choice_suite
from tappa.evaluation.statistics import average_of, holm, paired_difference, stratified_difference
from tappa.pruning import (
    Amounts,
    Calibration,
    Plan,
    Windows,
    calibrate_on,
    head_importance,
    layers_removed,
    nll_of_windows,
    perplexity_of,
    plan,
    silence_heads,
)
from tappa.pruning.structure import attention_in, decoder_layers, output_projection
from tappa.texts import packaged_halves

SHARES = (0.1, 0.2, 0.3)
BETAS = (0.1, 0.2, 0.3, 0.5)
SEEDS = (0, 1, 2)
Case = tuple[str, str, float, Plan]  # what is removed, order, share, plan


def layer_cases(model: Any, calibration: Calibration, windows: Windows) -> Iterator[Case]:
    """Every order and share of layers."""
    count = calibration.model["layers"]
    orders: list[tuple[str, dict[str, Any]]] = [
        *((name, {"order": name}) for name in ("bi", "q_similarity", "uniform", "reverse")),
        *((f"bi_prime, beta {beta}", {"order": "bi_prime", "beta": beta}) for beta in BETAS),
        *((f"random, seed {seed}", {"order": "random", "seed": seed}) for seed in SEEDS),
    ]
    for share in SHARES:
        for name, options in orders:
            wanted = Amounts(layers=round(share * count), **options)
            yield "layers", name, share, plan(model, calibration, wanted)
    most = Amounts(layers=round(max(SHARES) * count), order="greedy")
    chosen = plan(model, calibration, most, windows).layers  # fewer are the first of these
    for share in SHARES:
        yield "layers", "greedy", share, Plan(layers=chosen[: round(share * count)])


def head_cases(calibration: Calibration) -> Iterator[Case]:
    """Every order and share of query heads, silenced."""
    layers, heads = calibration.q_similarity.shape
    orders = {
        "high q-similarity first": head_importance(calibration, "dissimilarity"),
        "low q-similarity first": -head_importance(calibration, "dissimilarity"),
        "small output first": head_importance(calibration, "output"),
        "mix": head_importance(calibration, "mix"),
    }
    for seed in SEEDS:
        orders[f"random, seed {seed}"] = np.random.default_rng(seed).random((layers, heads))
    for share in SHARES:
        for name, figure in orders.items():
            count = round(share * layers * heads)
            places = np.argsort(figure.ravel(), kind="stable")[:count]
            gone = [(int(p) // heads, int(p) % heads) for p in places]
            yield "heads", name, share, Plan(query_heads=gone)


def run(options: argparse.Namespace) -> None:
    model, tokenizer = tappa.load(options.model, device=options.device, dtype=options.dtype)
    first, second = packaged_halves()
    known = Windows.of(model, tokenizer, first, limit=options.windows)
    held = Windows.of(model, tokenizer, second, stride=1024, limit=options.windows)
    greedy = Windows.of(model, tokenizer, first, window=512, stride=512, limit=options.greedy)
    calibration = calibrate_on(model, known, state=options.out.with_suffix(".calibration.json"))
    lines = (
        [json.loads(x) for x in options.out.read_text().splitlines()]
        if options.out.exists()
        else []
    )
    found = {(x["what"], x["order"], x["share"]): x for x in lines}
    measured = {_key(x["layers"], x["heads"]): x for x in lines}
    parts: list[Iterator[Case]] = [iter([("layers", "none", 0.0, Plan())])]
    if options.what in ("both", "heads"):
        parts.append(head_cases(calibration))
    if options.what in ("both", "layers"):
        parts.append(layer_cases(model, calibration, greedy))
    with tempfile.TemporaryDirectory() as folder:
        tasks = write_choice_suite(Path(folder), per_task=options.limit)
        harness = _harness(model, tokenizer, options.batch)
        for what, order, share, wanted in itertools.chain(*parts):
            if (what, order, share) in found:
                continue
            key = _key(wanted.layers, wanted.query_heads)
            if key not in measured:
                with layers_removed(model, wanted.layers), silenced(model, wanted.query_heads):
                    nll = nll_of_windows(model, held)
                    right = choices(harness, tasks, Path(folder))
                measured[key] = {"nll": nll, "right": right}
            line = {"what": what, "order": order, "share": share, "model": calibration.model}
            line |= {"layers": wanted.layers, "heads": wanted.query_heads}
            line |= {name: measured[key][name] for name in ("nll", "right")}
            with options.out.open("a") as file:
                file.write(json.dumps(line) + "\n")
            accuracy = np.mean([np.mean(x) for x in line["right"].values()])
            print(
                f"{what} {order} {share}: perplexity {perplexity_of(line['nll']):.2f}, "
                f"accuracy {accuracy:.3f}",
                file=sys.stderr,
            )


def _key(layers: Any, heads: Any) -> str:
    return json.dumps([sorted(layers), sorted(map(list, heads))])


@contextmanager
def silenced(model: Any, heads: Sequence[tuple[int, int]]) -> Iterator[None]:
    """The model without what some query heads add, inside of a `with`."""
    layers = decoder_layers(model)
    weights = [output_projection(attention_in(layers[i])).weight for i in {i for i, _ in heads}]
    before = [weight.clone() for weight in weights]
    silence_heads(model, heads)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, old in zip(weights, before, strict=True):
                weight.copy_(old)


def _harness(model: Any, tokenizer: Any, batch: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)


def choices(harness: Any, tasks: list[str], folder: Path) -> dict[str, list[float]]:
    """Of every task: for each question, whether it was answered right."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    done = simple_evaluate(model=harness, tasks=tasks, task_manager=manager, bootstrap_iters=0)
    return {
        name: [s["acc_norm"] for s in sorted(done["samples"][name], key=lambda s: s["doc_id"])]
        for name in tasks
    }


def table(options: argparse.Namespace) -> None:
    lines = [json.loads(x) for file in options.files for x in file.read_text().splitlines()]
    for name in dict.fromkeys(x["model"]["name"] for x in lines):
        mine = [x for x in lines if x["model"]["name"] == name]
        whole = next(x for x in mine if x["order"] == "none")
        for what in ("layers", "heads"):
            for share in sorted({x["share"] for x in mine if x["what"] == what and x["share"]}):
                print(_table(name, what, share, mine, whole))


def short(options: argparse.Namespace) -> None:
    """One table of all models and shares: layers only, no intervals."""
    lines = [json.loads(x) for file in options.files for x in file.read_text().splitlines()]
    lines = [x for x in lines if x["what"] == "layers"]
    heads, columns = ["| |"], []
    for name in dict.fromkeys(x["model"]["name"] for x in lines):
        mine = [x for x in lines if x["model"]["name"] == name]
        whole = next(x for x in mine if x["order"] == "none")
        for share in sorted({x["share"] for x in mine if x["share"]}):
            group = Comparison(mine, "layers", share)
            cells = {}
            for order in ("greedy", "bi", *(f"bi_prime, beta {b}" for b in BETAS), "q_similarity"):
                cells[order] = group.cell(order)
            cells["uniform"], cells["reverse"] = group.cell("uniform"), group.cell("reverse")
            seeds = [f"random, seed {seed}" for seed in SEEDS]
            best = min(seeds, key=lambda order: np.mean(group.rows[order]["nll"]))
            cells[f"random, best of {len(SEEDS)} seeds"] = group.cell(best)
            cells["nothing removed"] = "" if columns and columns[-1][0] == name else plain(whole)
            heads.append(f"{name}: {len(group.base['layers'])} of {whole['model']['layers']} |")
            columns.append((name, cells))
    print(" ".join(heads))
    print("|---" * len(heads) + "|")
    first = columns[0][1]
    for order in ["nothing removed", *(x for x in first if x != "nothing removed")]:
        print(f"| {order} | " + " | ".join(cells[order] for _, cells in columns) + " |")


def plain(line: dict[str, Any]) -> str:
    accuracy = average_of(list(line["right"].values())).mean
    return f"{perplexity_of(line['nll']):,.1f} ({accuracy:.2f})".replace("(0.", "(.")


class Comparison:
    """What the orders cost at one share, each beside the base by paired tests."""

    def __init__(self, lines: list[dict[str, Any]], what: str, share: float) -> None:
        self.rows = {x["order"]: x for x in lines if (x["what"], x["share"]) == (what, share)}
        self.base = self.rows["bi" if what == "layers" else "random, seed 0"]
        others = [x for x in self.rows.values() if x is not self.base]
        base_right = list(self.base["right"].values())
        nll = [paired_difference(x["nll"], self.base["nll"]) for x in others]
        right = [stratified_difference(list(x["right"].values()), base_right) for x in others]
        corrected = holm([d.p for d in (*nll, *right)])
        self.tests = len(corrected)
        self.nll, self.right = {}, {}
        for place, line in enumerate(others):
            self.nll[line["order"]] = nll[place], corrected[place]
            self.right[line["order"]] = right[place], corrected[len(others) + place]

    def cell(self, order: str) -> str:
        """Perplexity (accuracy): + is better than the base, − worse, at p < .05."""
        text = plain(self.rows[order])
        if self.rows[order] is self.base:
            return text
        perplexity, accuracy = text.removesuffix(")").split(" (")
        (nll, p), (right, q) = self.nll[order], self.right[order]
        return f"{perplexity}{_sign(-nll.mean, p)} ({accuracy}{_sign(right.mean, q)})"


def _sign(gain: float, p: float) -> str:
    return "" if p >= 0.05 else "+" if gain > 0 else "−"


def _table(name: str, what: str, share: float, lines: list[dict], whole: dict) -> str:
    group = Comparison(lines, what, share)
    base = group.base
    count = len(base["layers"] or base["heads"])
    size = whole["model"]["layers"] * (1 if what == "layers" else whole["model"]["heads"])
    n = sum(map(len, whole["right"].values()))
    out = [
        f"### {name}: {count} of {size} {what} removed",
        "",
        f"n = {len(whole['nll'])} windows of 1024 tokens, {n} questions ({n // 5} a task); in "
        f"brackets the paired difference from {base['order']} with its 95% interval; * p < .05 "
        f"after Holm over the {group.tests} tests of this table",
        "",
        "| order | gone | perplexity | accuracy |",
        "|---|---|---|---|",
    ]
    for row in [whole, *sorted(group.rows.values(), key=lambda x: np.mean(x["nll"]))]:
        mean = average_of(list(row["right"].values()))
        cells = [f"{perplexity_of(row['nll']):.2f}", f"{mean.mean:.3f} ± {mean.error:.3f}"]
        if row is not whole and row is not base:
            for i, (d, p) in enumerate((group.nll[row["order"]], group.right[row["order"]])):
                unit = " nats" if i == 0 else ""
                star = "*" if p < 0.05 else ""
                difference = f" ({d.mean:+.3f}{unit}, {d.low:+.3f} to {d.high:+.3f}){star}"
                cells[i] += difference.replace("-", "−")
        gone = ", ".join(map(str, sorted(row["layers"]))) or (str(len(row["heads"])) + " heads")
        out.append(f"| {row['order']} | {'–' if row is whole else gone} | {' | '.join(cells)} |")
    return "\n".join(out) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("run")
    one.set_defaults(call=run)
    one.add_argument("model")
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--what", choices=("both", "layers", "heads"), default="both")
    one.add_argument("--limit", type=int, default=100, help="questions of each task")
    one.add_argument("--windows", type=int, default=32)
    one.add_argument("--greedy", type=int, default=4, help="windows of 512 tokens for greedy")
    one.add_argument("--batch", type=int, default=16)
    one.add_argument("--device", default="auto")
    one.add_argument("--dtype", default="auto")
    for name, call in (("table", table), ("short", short)):
        other = commands.add_parser(name)
        other.set_defaults(call=call)
        other.add_argument("files", type=Path, nargs="+")
    options = parser.parse_args()
    options.call(options)


if __name__ == "__main__":
    main()
