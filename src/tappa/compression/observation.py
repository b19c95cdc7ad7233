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
    entropy_over_tokens,
    variance_over_window,
)
from tappa.rope import RotaryChannels
from tappa.similarity import UnitSums


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
    ) -> None:
        """The next queries of the prompt, post-RoPE: remember the last `window`."""
        if window and len(positions):
            new = max(self.window.shape[1] + len(positions) - window, 0)  # leave the window
            self.window = torch.cat([self.window[:, new:], queries[:, -window:]], 1)
            self.window_positions = torch.cat([self.window_positions[new:], positions[-window:]])
        if len(positions):
            self.end = int(positions[-1]) + 1

    def learn(
        self,
        queries: Float[Tensor, "heads new dim"],
        positions: Int[Tensor, " new"],
        scorer: Scorer,
        rule: Rule,
    ) -> None:
        """Add queries of the prompt to the sums that scorer and rule take."""
        self.prompt_tokens += len(positions)
        if not ("similarity" in rule.needs or "moments" in scorer.needs):
            return
        before = queries.float()  # where no RoPE is known, they come without it
        if self.rotary is not None:
            before = self.rotary.unrotate(before, positions)
        if "similarity" in rule.needs:
            space, pairs, extent = rule.variant
            unit = normalize(before if space == "pre" else queries.float(), dim=-1)
            window = max(len(self.window_positions), 2) if extent == "window" else 1
            self.units.add(unit, window, adjacent=pairs == "adjacent")
        if "moments" in scorer.needs:
            skipped = int((positions < self.first + SKIPPED).sum())  # positions ascend
            x = before[:, skipped:]
            sums = x.shape[1], x.sum(1), x.mT @ x
            known = self.moments
            if known is not None:
                old = known.count, known.total, known.outer
                sums = old[0] + sums[0], old[1] + sums[1], old[2] + sums[2]
            self.moments = Moments(*sums)

    def evidence(self, blank: Evidence, rule: Rule, tokens: TokenView) -> Evidence:
        """What the rule wants to know of this layer."""
        kv_heads = len(tokens.keys)
        if "similarity" in rule.needs:
            sums = self.units.sums(max(tokens.window.shape[1], 2))
            cosines, pairs = next(
                (total, count)
                for kind, extent, total, count in sums
                if (kind, extent) == (rule.variant.pairs, rule.variant.extent)
            )
            mean = (cosines / max(pairs, 1)).view(kv_heads, -1).mean(1)
            blank = replace(blank, similarity=mean.float())
        if "window" in rule.needs:
            earlier = tokens.earlier.repeat_interleave(len(tokens.window) // kv_heads, 0)
            weights = tokens.weights * earlier[:, None]
            entropy = entropy_over_tokens(weights).sum(1).view(kv_heads, -1)
            spread = variance_over_window(weights).sum(1).view(kv_heads, -1)
            blank = replace(blank, entropy=entropy.sum(1), variance=spread.sum(1))
        if "predictability" in rule.needs:
            lasting = torch.minimum(tokens.weights[:, 1:], tokens.weights[:, :-1]).sum(2)
            least = lasting.mean(1).view(kv_heads, -1).amin(1)
            blank = replace(blank, predictability=least)
        return blank

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
