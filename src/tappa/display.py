"""An Analysis on a terminal: a map of all heads, the most typical ones, and what agrees."""

from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from tappa.analysis import Analysis
from tappa.compression import Estimate, Written
from tappa.patterns import LABELS, explain
from tappa.pruning import Calibration, Plan, layer_rows
from tappa.wording import byte_size

LETTERS = dict(zip(LABELS, "RSPL·", strict=True))
STYLES = dict(zip(LABELS, ("cyan", "green", "magenta", "yellow", "dim"), strict=True))


def show(analysis: Analysis, console: Console) -> None:
    """Print the whole analysis."""
    console.print(render(analysis))


def render(analysis: Analysis) -> RenderableType:
    """Header, head map, typical heads, agreement."""
    summary = analysis.summary()
    parts = (_header(summary), _legend(), _head_map(analysis), _typical(analysis))
    spaced = [item for part in parts for item in (part, Text())]
    return Group(*spaced, _agreement(summary))


def _header(summary: dict[str, Any]) -> Text:
    model, heads = summary["model"], len(summary["heads"])
    return Text.assemble(
        (model["name"], "bold"),
        f"  {model['class']}, {model['layers']} layers, {heads} heads, ",
        f"{summary['tokens']:,} tokens in {len(summary['prompts'])} prompt(s)",
    )


def _legend() -> Text:
    """What the letters of the head map mean."""
    letters = "  ".join(f"{letter} {name}" for name, letter in LETTERS.items())
    return Text(f"{letters}\nsmall letter, ∘: queries, keys and RoPE alone explain it otherwise")


def _head_map(analysis: Analysis) -> Table:
    """A line for each layer: the observed label of every head, small where not explained."""
    table = Table(box=None, pad_edge=False)
    for name in ("layer", "heads", "q-similarity", "k-similarity", "predictability"):
        table.add_column(name, justify="left" if name == "heads" else "right")
    frame = analysis.to_frame()
    for layer, rows in frame.groupby("layer"):
        marks = Text()
        for observed, explained in zip(rows["observed"], rows["explained"], strict=True):
            letter = LETTERS[observed]
            other = "∘" if letter == "·" else letter.lower()
            marks.append(letter if observed == explained else other, STYLES[observed])
        means = rows[["q_similarity", "k_similarity", "predictability"]].mean()
        table.add_row(str(layer), marks, *(f"{value:.2f}" for value in means))
    return table


def _typical(analysis: Analysis, each: int = 3) -> Table:
    """The heads with the strongest evidence for each observed label."""
    table = Table(title="Most typical heads", title_justify="left", box=None, pad_edge=False)
    for name, justify in (("head", "left"), ("observed", "left"), ("S", "right"), ("why", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name in LABELS:
        rows = [head for head in analysis.heads if head["observed"] == name]
        rows.sort(key=lambda head: -head["observed_scores"][head["observed"]])
        for head in rows[:each]:
            place = f"L{head['layer']} H{head['head']}"
            similarity = f"{head['q_similarity'] or 0:.2f}"
            table.add_row(place, Text(name, STYLES[name]), similarity, explain(head))
    return table


def _agreement(summary: dict[str, Any]) -> Text:
    figures = summary["agreement"]
    return Text.assemble(
        "bounds of the theorems: ",
        (f"{summary['bound_violations']} violations", "bold"),
        f" in {summary['bounds_checked']:,} checks\n",
        f"explained = observed on {figures['accuracy']:.0%} of heads",
        f" (balanced accuracy {figures['balanced_accuracy']:.2f}",
        f" over {figures['labels_observed']} labels that occur)\n",
        "rank correlation with real persistence: ",
        f"expected vertical {_two(figures['spearman_expected_vertical'])}, ",
        f"expected diagonal {_two(figures['spearman_expected_diagonal'])}, ",
        f"q-similarity with predictability {_two(figures['spearman_q_similarity_predictability'])}",
    )


def _two(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f}"


def render_written(written: Written, method: str) -> RenderableType:
    """Tokens, memory and time of a continuation."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim")
    table.add_column()
    share = written.nbytes / max(written.full_nbytes, 1)
    rate = (written.new_tokens - 1) / written.decode_seconds if written.new_tokens > 1 else 0
    table.add_row("method", method)
    table.add_row(
        "tokens",
        f"{written.tokens_seen:,} seen, {written.tokens_held:,.0f} held per layer and head",
    )
    table.add_row(
        "KV cache",
        f"{_megabytes(written.nbytes)} held ({share:.0%} of {_megabytes(written.full_nbytes)} for "
        f"all tokens), {_megabytes(written.peak_nbytes)} at peak",
    )
    table.add_row("beside it", f"{_megabytes(written.beside_nbytes)} remembered of queries")
    table.add_row(
        "time",
        f"prefill {written.prefill_seconds:.2f} s ({written.prompt_tokens:,} tokens), "
        f"decode {written.decode_seconds:.2f} s ({written.new_tokens:,} tokens, {rate:.1f} per s)",
    )
    return Group(Text("\n"), table)


def render_estimate(
    expected: Estimate, prompt: int, new: int, weights: int | None
) -> RenderableType:
    """What a KV cache will take at most."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim")
    table.add_column()
    share = expected.held_nbytes / expected.full_nbytes
    table.add_row("tokens", f"{prompt:,} of the prompt, {new:,} new")
    table.add_row("weights", "unknown before a download" if weights is None else byte_size(weights))
    table.add_row("full cache", f"{byte_size(expected.full_nbytes)} for all tokens")
    table.add_row("KV cache", f"{byte_size(expected.held_nbytes)} held at the end ({share:.0%})")
    table.add_row("at peak", f"{byte_size(expected.peak_nbytes)} while the prompt is read")
    table.add_row("one layer", f"{byte_size(expected.layer_nbytes)} at most before it is cut")
    return table


def render_methods(described: dict[str, str]) -> RenderableType:
    """Name and line of each method."""
    table = Table(box=None, pad_edge=False)
    table.add_column("method", style="bold", no_wrap=True)
    table.add_column("what it keeps (source)")
    for name, line in described.items():
        table.add_row(name, Text(line))
    return table


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def render_plan(calibration: Calibration, wanted: Plan) -> str:
    """Scores of every layer, what goes, and in which order."""
    lines = ["layer      BI  q-similarity     BI'"]
    for row in layer_rows(calibration, wanted):
        mark = f"  removed as number {row['removed']}" if row["removed"] else ""
        figures = f"{row['bi']:7.4f}  {row['q_similarity']:12.4f}  {row['bi_prime']:6.3f}"
        lines.append(f"{row['layer']:5}  {figures}{mark}")
    for name, heads in (("silenced", wanted.query_heads), ("sliced out", wanted.kv_groups)):
        if heads:
            kind = "query heads" if name == "silenced" else "KV heads and their query heads"
            listed = ", ".join(f"L{layer} H{head}" for layer, head in heads)
            lines.append(f"{kind}, {name}: {listed}")
    return "\n".join(lines) + "\n"
