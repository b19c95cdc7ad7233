"""The bounds of the theorems, on every head: how often they hold, and how tight they are."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tappa.analysis import Analysis
from tappa.capture import LayerView
from tappa.theory import BOUNDS, median_tightness

NAMES = {
    "vertical": "Theorem 5.1, shift (1, 0)",
    "sequential": "Theorem 5.2, shift (1, 1)",
    "residual": "Theorem 5.3, dominant channel",
    "seasonal": "Theorem 5.4, shift (L, L)",
    "seasonal_rows": "Theorem 5.4, shift (L, 0)",
    "seasonal_columns": "Theorem 5.4, shift (0, L)",
    "jump": "Proposition 4.1, lower bound",
    "attention": "attention: TV <= tanh(range / 4) + new mass",
}
ROWS = 16  # rows of each head on which attention is checked
SLACK = 1e-5  # rounding allowed in a total variation


@dataclass(frozen=True)
class BoundResult:
    """A bound over all heads: pairs checked, violations, median of bound / actual."""

    name: str
    checked: int
    violations: int
    tightness: float  # NaN where nothing was to be bounded

    @property
    def verdict(self) -> str:
        """Untestable where there was nothing to check."""
        if not self.checked:
            return "untestable"
        return "fail" if self.violations else "pass"


def logit_bounds(analysis: Analysis) -> list[BoundResult]:
    """Those that an Analysis has checked."""
    found = []
    for place, name in enumerate(BOUNDS):
        sums = [
            {key: layer.sums[key][:, place] for key in ("checked", "violations", "tightness")}
            for layer in analysis.layers
        ]
        histogram = torch.tensor(sum(x["tightness"].sum(0) for x in sums))
        found.append(
            BoundResult(
                name,
                int(sum(x["checked"].sum() for x in sums)),
                int(sum(x["violations"].sum() for x in sums)),
                median_tightness(histogram),
            )
        )
    return found


def attention_changes(
    view: LayerView, rows: int = ROWS
) -> tuple[Float[Tensor, "heads rows"], Float[Tensor, "heads rows"]]:
    """(total variation, its bound) between the attention of neighbouring rows, of some rows.

    Over the keys that both rows see, logits differ by D: `TV <= tanh((max D - min D) / 4)`, plus
    the attention that either row pays to keys which the other does not see.
    """
    heads, steps, dim = view.queries.shape
    at = torch.linspace(1, steps - 2, min(rows, max(steps - 2, 1))).long().unique()
    grouped = view.queries.double().view(len(view.keys), -1, steps, dim)
    keys = view.keys.double()[:, None].mT.expand(-1, grouped.shape[1], -1, -1)

    def row(shift: int) -> tuple[Tensor, Tensor]:
        positions = at + shift + view.query_start
        logits = view.attention.logits(grouped[:, :, at + shift], keys)
        columns = torch.arange(keys.shape[-1]) + view.key_start
        seen = view.attention.visible(positions, columns).to(logits.device)
        return logits.view(heads, len(at), -1), seen

    (now, sees), (then, will_see) = row(0), row(1)
    p, q = (
        x.masked_fill(~seen, -torch.inf).softmax(-1) for x, seen in ((now, sees), (then, will_see))
    )
    both = sees & will_see
    change = then - now
    span = change.masked_fill(~both, -torch.inf).amax(-1) - change.masked_fill(
        ~both, torch.inf
    ).amin(-1)
    outside = (p * ~both).sum(-1) + (q * ~both).sum(-1)
    return (p - q).abs().sum(-1) / 2, torch.tanh(span / 4) + outside


class AttentionBound:
    """Adds up `attention_changes` over the layers of a prompt: a consumer for `prefill`."""

    def __init__(self) -> None:
        self.checked = self.violations = 0
        self.ratios: list[Tensor] = []

    def __call__(self, view: LayerView) -> None:
        """Take in one layer."""
        actual, bound = attention_changes(view)
        self.checked += actual.numel()
        self.violations += int((~(actual <= bound + SLACK)).sum())
        self.ratios.append((bound / actual)[actual > SLACK].flatten().cpu())

    def result(self) -> BoundResult:
        """What was found."""
        ratios = torch.cat(self.ratios) if self.ratios else torch.empty(0)
        median = float(ratios.median()) if len(ratios) else float("nan")
        return BoundResult("attention", self.checked, self.violations, median)
