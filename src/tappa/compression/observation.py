"""What a compressed layer remembers of the queries of one prompt, in memory that does not grow."""

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from tappa.compression.budgets import Evidence, Rule
from tappa.compression.scorers import (
    SKIPPED,
    Moments,
    Scorer,
    TokenView,
)
from tappa.kernels.unit_queries import Table, unit_query_sums
from tappa.rope import RotaryChannels
from tappa.similarity import DEFAULT, UnitSums


@dataclass
class Observation:
    """Last queries, sums for q-similarity, moments of queries: only what scorer and rule need."""

    window: Float[Tensor, "heads window dim"]
    window_positions: Int[Tensor, " window"]
    first: int  # position of the first token
    end: int  # position after the last one
    prompt_tokens: int = 0  # of those that were learned from
    rotary: RotaryChannels | None = None
    moments: Moments | None = None
    units: UnitSums = field(default_factory=UnitSums)

    @classmethod
    def empty(cls, queries: Float[Tensor, "heads new dim"], first: int) -> "Observation":
        """Before the first token, which stands at position `first`."""
        none = torch.zeros(0, dtype=torch.int64, device=queries.device)
        return cls(queries[:, :0], none, first, first)

    def see(
        self,
        queries: Float[Tensor, "heads new dim"],
        positions: Int[Tensor, " new"],
        window: int,
        end: int,
    ) -> None:
        """The next queries of the prompt, post-RoPE, up to position `end`: keep the last `window`.

        The positions are on the device; what their last one is, the CPU is told and need not ask.
        """
        self.end = end
        if window and len(positions):
            new = max(self.window.shape[1] + len(positions) - window, 0)  # leave the window
            self.window = torch.cat([self.window[:, new:], queries[:, -window:]], 1)
            self.window_positions = torch.cat([self.window_positions[new:], positions[-window:]])

    def learn(
        self,
        queries: Float[Tensor, "heads new dim"],
        positions: Int[Tensor, " new"],
        scorer: Scorer,
        rule: Rule,
        table: Table | None = None,
    ) -> None:
        """Add queries of the prompt to the sums that scorer and rule take.

        `table` is that of the RoPE at these positions, if it is known.
        """
        self.prompt_tokens += len(positions)
        similarity = "similarity" in rule.needs
        if similarity and rule.variant == DEFAULT and self.rotary is not None:
            self._learn_units(queries, table or self.rotary.table(positions), self.rotary)
            similarity = False
        if not (similarity or "moments" in scorer.needs):
            return
        before = queries.float()  # where no RoPE is known, they come without it
        if self.rotary is not None:
            before = self.rotary.turn_back(before, *(table or self.rotary.table(positions)))
        if similarity:
            space, pairs, extent = rule.variant
            unit = normalize(before if space == "pre" else queries.float(), dim=-1)
            window = max(len(self.window_positions), 2) if extent == "window" else 1
            self.units.add(unit, window, adjacent=pairs == "adjacent")
        if "moments" in scorer.needs:
            skipped = int((positions < self.first + SKIPPED).sum())  # positions ascend
            x = before[:, skipped:]
            new = x.shape[1], x.sum(1), x.mT @ x
            known = self.moments
            if known is not None:
                new = known.count + new[0], known.total + new[1], known.outer + new[2]
            self.moments = Moments(*new)

    def _learn_units(
        self, queries: Float[Tensor, "heads new dim"], table: Table, rotary: RotaryChannels
    ) -> None:
        """What q-similarity before RoPE, of all pairs of the prompt, needs."""
        total, squares = unit_query_sums(queries, table, rotary)
        units = self.units
        if units.total is None or units.squares is None:
            units.total, units.squares, units.tail = total, squares, queries[:, :0].float()
        else:
            units.total, units.squares = units.total + total, units.squares + squares
        units.steps += queries.shape[1]

    def evidence(self, blank: Evidence, rule: Rule, tokens: TokenView) -> Evidence:
        """What the rule wants to know of this layer."""
        kv_heads = len(tokens.keys)
        if "similarity" in rule.needs:
            found = self.units.sums(max(tokens.window.shape[1], 2))
            cosines, pairs = next(
                (total, count)
                for kind, extent, total, count in found
                if (kind, extent) == (rule.variant.pairs, rule.variant.extent)
            )
            mean = (cosines / max(pairs, 1)).view(kv_heads, -1).mean(1)
            blank = replace(blank, similarity=mean.float())
        if "window" in rule.needs:
            sums, group = tokens.window_sums, len(tokens.window) // kv_heads
            spread = group * (sums.variance * tokens.earlier).sum(1)
            blank = replace(blank, entropy=sums.entropy, variance=spread)
        if "predictability" in rule.needs:
            lasting = torch.minimum(tokens.weights[:, 1:], tokens.weights[:, :-1]).sum(2)
            least = lasting.mean(1).view(kv_heads, -1).amin(1)
            blank = replace(blank, predictability=least)
        return blank

    def restart(self, window: Float[Tensor, "heads window dim"], end: int) -> None:
        """The last queries are these, before position `end`."""
        count = window.shape[1]
        self.window, self.end = window, end
        self.window_positions = torch.arange(end - count, end, device=window.device)

    def tensors(self) -> list[Tensor]:
        """All that takes memory."""
        found = [self.window, self.window_positions]
        if self.moments is not None:
            found += [self.moments.total, self.moments.outer]
        units = (self.units.total, self.units.squares, self.units.adjacent, self.units.tail)
        return found + [x for x in units if isinstance(x, Tensor)]

    def forget_from(self, position: int) -> None:
        """Forget the queries at this position and later ones."""
        kept = self.window_positions < position
        self.window, self.window_positions = self.window[:, kept], self.window_positions[kept]
        self.end = min(self.end, position)
