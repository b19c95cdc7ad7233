"""What people read of a pruned model: tables, the model card, the plot."""

import importlib.util
import io
import json
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from tappa.errors import PruningError
from tappa.files import check_writable_folder, finite
from tappa.pruning.calibration import Calibration
from tappa.pruning.importance import bi_prime, head_importance
from tappa.pruning.measure import Figures
from tappa.pruning.plan import Plan

LARGE = 1e5  # a perplexity above this is written with an exponent


def layer_rows(calibration: Calibration, wanted: Plan) -> list[dict[str, Any]]:
    """Scores of every layer, and at which step it goes (None: it stays)."""
    influence, similarity = calibration.block_influence, calibration.layer_similarity
    both = bi_prime(influence, similarity, wanted.settings["beta"])
    steps = {layer: step for step, layer in enumerate(wanted.layers, start=1)}
    return [
        {
            "layer": layer,
            "bi": float(influence[layer]),
            "q_similarity": float(similarity[layer]),
            "bi_prime": float(both[layer]),
            "removed": steps.get(layer),
        }
        for layer in range(len(influence))
    ]


def as_json(
    calibration: Calibration,
    wanted: Plan,
    figures: tuple[Figures, Figures] | None = None,
    texts: dict[str, str] | None = None,
) -> str:
    """Everything, for machines; `figures` before and after, `texts` as in `model_card`."""
    before, after = figures or (None, None)
    importance = head_importance(calibration, wanted.settings["importance"])
    content = {
        "schema": "tappa.pruning/1",
        "model": calibration.model,
        "calibration": calibration.settings
        | {"windows": calibration.windows, "tokens": calibration.tokens},
        "plan": asdict(wanted),
        "layers": layer_rows(calibration, wanted),
        "head_importance": [[round(float(x), 6) for x in row] for row in importance],
        "texts": texts or {},
        "before": None if before is None else _figures(before),
        "after": None if after is None else _figures(after),
    }
    return json.dumps(finite(content), indent=1, allow_nan=False) + "\n"


def _figures(figures: Figures) -> dict[str, Any]:
    return asdict(figures) | {"tokens_per_second": figures.tokens_per_second}


def figures_table(before: Figures, after: Figures) -> str:
    """Before and after, as Markdown."""
    lines = ["| | before | after | after / before |", "|---|---|---|---|"]
    for label, name, form in (
        ("parameters", "parameters", ",d"),
        ("bytes", "nbytes", ",d"),
    ):
        old, new = getattr(before, name), getattr(after, name)
        lines.append(f"| {label} | {old:{form}} | {new:{form}} | {_ratio(old, new)} |")
    speed = f"tokens/s of one sequence (median, least to most of {len(before.speeds)})"
    old, new = before.tokens_per_second, after.tokens_per_second
    cells = [
        f"{x.tokens_per_second:.1f} ({min(x.speeds):.1f} to {max(x.speeds):.1f})"
        for x in (before, after)
    ]
    lines.append(f"| {speed} | {' | '.join(cells)} | {_ratio(old, new)} |")
    old, new = before.perplexity, after.perplexity
    cells = [f"{x:.2f}" if x < LARGE else f"{x:.3g}" for x in (old, new)]
    label = f"perplexity (n = {len(before.nll)} windows)"
    lines.append(f"| {label} | {' | '.join(cells)} | {_ratio(old, new)} |")
    return "\n".join(lines) + f"\nMeasured on {before.where}.\n"


def _ratio(old: int | float, new: int | float) -> str:
    if not old or not np.isfinite(old) or not np.isfinite(new):
        return "-"
    return f"{new / old:.3f}" if 1 / LARGE < new / old < LARGE else f"{new / old:.3g}"


def model_card(
    calibration: Calibration, wanted: Plan, figures: tuple[Figures, Figures], texts: dict[str, str]
) -> str:
    """README.md of a pruned checkpoint. `texts`: what calibration and perplexity were made on."""
    settings, source = wanted.settings, calibration.model
    path = Path(source["name"])  # of what lies on a disk the name alone: paths tell of people
    name = _plain(path.name if path.is_absolute() or path.exists() else source["name"])
    removed = [f"- layers (in order of removal): {_list(wanted.layers)}"] if wanted.layers else []
    if wanted.query_heads:
        removed.append(
            f"- query heads, silenced (no smaller, no faster): {_heads(wanted.query_heads)}"
        )
    if wanted.kv_groups:
        removed.append(f"- KV heads with their query heads, sliced out: {_heads(wanted.kv_groups)}")
    by = []
    if wanted.layers:
        uses = {"bi_prime": "beta", "reverse": "beta", "random": "seed"}.get(settings["order"])
        with_it = f", {uses} {settings[uses]}" if uses else ""
        by.append(f"layers by `{settings['order']}`{with_it}")
    if wanted.query_heads or wanted.kv_groups:
        by.append(f"heads by `{settings['importance']}`")
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "tags: [pruned, tappa]",
            "---",
            f"# {name}, pruned",
            "",
            f"- source: {name} ({source['class']}, {source['layers']} layers, "
            f"{source['heads']} heads, {source['kv_heads']} KV heads, {source['dtype']})",
            f"- method: tappa {version('tappa')}, {'; '.join(by) or 'nothing removed'}",
            f"- calibration: {_plain(texts['calibration'])}, {calibration.windows} windows of "
            f"{calibration.settings['window']} tokens, stride {calibration.settings['stride']}",
            *removed,
            "",
            figures_table(*figures),
            f"Perplexity on {_plain(texts['held_out'])}, windows of "
            f"{calibration.settings['window']} tokens. Nothing was trained after removal. Made on "
            f"{datetime.now(UTC):%Y-%m-%d}.",
            "",
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")',
            'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")',
            "```",
            "",
            "All scores are in `pruning.json`.",
            "",
        ]
    )


def check_plot(path: str | Path) -> str:
    """The kind of picture, by its file name: call it before long work.

    Raises PruningError for another kind, and where matplotlib, an extra, is missing; OutputError
    for a folder that cannot be written to.
    """
    kind = Path(path).suffix.removeprefix(".").lower()
    if kind not in ("png", "svg", "pdf"):
        raise PruningError(f"expected a picture as .png, .svg or .pdf, got {path}")
    if importlib.util.find_spec("matplotlib") is None:
        raise PruningError("a plot needs the extra, pip install 'tappa[figures]'")
    check_writable_folder(Path(path).absolute().parent)
    return kind


def plot(calibration: Calibration, wanted: Plan, kind: str = "png") -> bytes:
    """BI, q-similarity and BI' of every layer; removed layers are shaded."""
    from matplotlib.figure import Figure

    rows = layer_rows(calibration, wanted)
    layers = [row["layer"] for row in rows]
    figure = Figure(figsize=(8, 6.5), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True)
    beta = wanted.settings["beta"]
    for panel, (name, label, colour) in zip(
        panels,
        [
            ("bi", "BI", "#0072B2"),
            ("q_similarity", "q-similarity S", "#009E73"),
            ("bi_prime", f"BI' (β = {beta:g})", "#D55E00"),
        ],
        strict=True,
    ):
        panel.plot(layers, [row[name] for row in rows], "o-", color=colour, markersize=4)
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
        for layer in wanted.layers:
            panel.axvspan(layer - 0.5, layer + 0.5, color="0.85", zorder=0, linewidth=0)
    panels[0].set_yscale("log")  # the first layer does more than all others
    panels[-1].set_xlabel("layer" + (" (shaded: removed)" if wanted.layers else ""))
    panels[0].set_title(_plain(calibration.model["name"]), fontsize=10)
    out = io.BytesIO()
    figure.savefig(out, format=kind, dpi=150)
    return out.getvalue()


def _list(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def _heads(heads: list[tuple[int, int]]) -> str:
    return ", ".join(f"L{layer} H{head}" for layer, head in heads)


def _plain(text: str) -> str:
    """A name or path on one line, without what Markdown or HTML would make something of."""
    flat = " ".join(str(text).split())
    return "".join(f"\\{c}" if c in "\\`*_[]<>#|$" else c for c in flat)
