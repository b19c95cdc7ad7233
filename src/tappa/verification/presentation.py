"""A verification for people: Markdown tables."""

import math
from collections.abc import Iterator, Sequence

from tappa.verification.bounds import NAMES
from tappa.verification.results import Verified


def to_markdown(found: Verified) -> str:
    """Every table, and the verdict."""
    model = found.model
    head = (
        f"{model['name']} ({model['class']}, {model['layers']} layers, {model['heads']} heads), "
        f"{found.tokens} tokens"
    )
    parts = [head, *_tables(found), *found.notes]
    parts.append("all that could be tested holds" if found.passed else "something FAILED")
    return "\n\n".join(parts) + "\n"


def _tables(found: Verified) -> Iterator[str]:
    if found.bounds:
        yield _table(
            "Bounds",
            ("claim", "pairs", "violations", "median bound / actual", "verdict"),
            [
                (NAMES[x.name], f"{x.checked:,}", x.violations, _number(x.tightness), x.verdict)
                for x in found.bounds
            ],
        )
    if found.relocations:
        yield _table(
            "Channels moved (Theorem 5.3): tokens between diagonals",
            ("head", "channel", "base", "predicted", "logits", "attention", "error", "verdict"),
            [
                (
                    f"L{x.layer} H{x.head}",
                    f"{x.source} to {x.target}",
                    "as it is" if x.base_factor == 1 else f"x {x.base_factor:g}",
                    _number(x.predicted),
                    _number(x.measured),
                    _number(x.attention),
                    "-" if x.error is None else f"{x.error:.3%}",
                    x.verdict + (f" ({x.reason})" if x.reason else ""),
                )
                for x in found.relocations
            ],
        )
    if found.constructed:
        patterns = dict.fromkeys(x.pattern for x in found.constructed)
        rows = []
        for pattern in patterns:
            mine = [x for x in found.constructed if x.pattern == pattern]
            right = sum(x.verdict == "pass" for x in mine)
            rows.append((pattern, f"{right} of {len(mine)}", max(x.noise for x in mine)))
        yield _table("Made-up heads", ("pattern", "both labels right", "noise up to"), rows)
    if found.observations:
        yield _table(
            "What the paper observed",
            ("claim", "S", "figure", "value", "95% interval", "heads"),
            [
                (x.claim, x.variant, x.figure, _number(x.value), _interval(x.low, x.high), x.n)
                for x in found.observations
            ],
        )
    if found.sensitivity:
        yield _table(
            "Who needs tokens: 1 - S against KL when cut to 64 tokens",
            ("grain", "S", "Spearman", "p", "n"),
            [(x.grain, x.variant, _number(x.value), _number(x.p), x.n) for x in found.sensitivity],
        )


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [f"**{title}**", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def _number(x: float | None) -> str:
    if x is None or not math.isfinite(x):
        return "-"
    return f"{x:.3f}" if abs(x) < 10 else f"{x:.2f}"


def _interval(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else f"{_number(low)} to {_number(high)}"
