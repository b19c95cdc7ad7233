"""Two computations of one text or one cache, compared where rounding cannot decide.

Two kernels, dtypes, machines or orders of summation round differently. Where the two best logits
of a step, or the scores on both sides of a cut, are a near tie, each may choose another token, and
what follows is another text. So one side is watched, and both are compared up to the first one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tappa.compression import cache
from tappa.compression.layer import CompressedLayer
from tappa.compression.scorers import TokenView

CLOSE = 1e-4  # between logits, as a share of the largest one
BORDER = 4e-5  # between scores or preferences, as a share of each


@dataclass
class Watched:
    """What a computation chose between."""

    logits: list[Tensor] = field(default_factory=list)  # (rows, vocabulary) after each pass
    cuts: int = 0  # of a row of a layer
    tied: int | None = None  # pass of the first cut that is a near tie

    def see_cut(self, clear: bool) -> None:
        """The cuts of a pass come before its logits."""
        self.cuts += 1
        if not clear and self.tied is None:
            self.tied = len(self.logits)

    def clear_steps(self, row: int) -> int:
        """Steps before the first near tie of a row."""
        ties = [step for step, x in enumerate(self.logits) if _near_tie(x[row])]
        return min([len(self.logits), *ties] + ([] if self.tied is None else [self.tied]))

    def check_text(self, actual: Any, expected: Any, least: int) -> bool:
        """Whether texts are the same to their end, where no step is a near tie.

        `expected` (rows, tokens) is what was watched. They must be the same before the first near
        tie, and that must be after `least` steps.
        """
        actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
        steps, prompt = len(self.logits), expected.shape[1] - len(self.logits)
        clear = [self.clear_steps(row) for row in range(len(expected))]
        for row, count in enumerate(clear):
            mine, theirs = (x[row, : prompt + count].tolist() for x in (actual, expected))
            told = f"row {row} differs in the {count} of {steps} steps before the first near tie"
            assert mine == theirs, told
        of = "logits" if self.tied is None or self.tied > min(clear) else "a cut"
        told = f"a near tie of {of} after {min(clear)} steps: choose another prompt"
        assert min(clear) >= least, told
        if min(clear) < steps:
            return False
        assert actual.shape == expected.shape
        return True

    def check_clear(self) -> None:
        """Something was chosen, and nothing between near ties: both sides must choose alike."""
        assert self.cuts or self.logits
        assert self.tied is None, "a cut is a near tie: choose another prompt"
        ties = [step for step, x in enumerate(self.logits) if any(map(_near_tie, x))]
        assert not ties, f"near ties of logits in passes {ties}: choose another prompt"


def _near_tie(logits: Tensor) -> bool:
    best, second = logits.float().topk(2).values
    return not float(best - second) >= CLOSE * float(logits.abs().max())


@contextmanager
def watched(model: Any = None, cuts: bool = True) -> Iterator[Watched]:
    """Watch the cuts of compressed caches and, of `model`, the last logits of every pass.

    Not the cuts in fixed steps: watch the other side. Of a real model's thousand cuts some are near
    ties, which change its text no more than other roundings: without `cuts` they are not watched.
    """
    seen = Watched()
    with pytest.MonkeyPatch.context() as patch:
        if cuts:
            _watch_cuts(patch, seen)
        head = model.get_output_embeddings() if model is not None else torch.nn.Identity()
        handle = head.register_forward_hook(lambda m, a, out: seen.logits.append(out[:, -1] + 0))
        try:
            yield seen
        finally:
            handle.remove()


def _watch_cuts(patch: pytest.MonkeyPatch, seen: Watched) -> None:
    patch.setattr(CompressedLayer, "rank", _noted_rank(CompressedLayer.rank))
    patch.setattr(CompressedLayer, "cut", _noted_cut(CompressedLayer.cut, seen))
    patch.setattr(cache, "allocate", _noted_division(cache.allocate, seen))  # type: ignore[attr-defined]


def _noted_rank(plain: Callable[..., None]) -> Callable[..., None]:
    """A layer remembers by which scores, of which positions, it has ranked a row."""

    def rank(layer: Any, row: int, tokens: TokenView) -> None:
        plain(layer, row, tokens)
        scores = layer.method.scorer.score(tokens)
        of_heads = [
            dict(zip(*pair, strict=True))
            for pair in zip(tokens.positions.tolist(), scores.tolist(), strict=True)
        ]
        layer.scored = getattr(layer, "scored", {}) | {row: of_heads}

    return rank


def _noted_cut(plain: Callable[..., None], seen: Watched) -> Callable[..., None]:
    """Cuts are clear if the same tokens stay when they score less and all others more.

    Equal scores are of one number (a maximum of neighbours), which is equal everywhere.
    """

    def cut(layer: Any, row: int, limits: list[int]) -> None:
        twin = layer.copy()
        plain(layer, row, limits)
        kept = [set(head) for head in _positions(layer, row)]
        pairs = list(zip(kept, layer.scored[row], strict=True))
        stay = {x for head, scored in pairs for p, x in scored.items() if p in head}
        go = {x for head, scored in pairs for p, x in scored.items() if p not in head}

        def against(tokens: TokenView) -> Tensor:
            moved = {x: x if x in stay & go else _off(x, -1 if x in stay else 1) for x in stay | go}
            heads = zip(layer.scored[row], tokens.positions.tolist(), strict=True)
            return torch.tensor([[moved.get(of.get(p), 0.0) for p in at] for of, at in heads])

        twin.method = replace(twin.method, scorer=replace(twin.method.scorer, score=against))
        plain(twin, row, limits)
        seen.see_cut(kept == [set(head) for head in _positions(twin, row)])

    return cut


def _off(x: float, sign: float) -> float:
    return x + sign * BORDER / 2 * abs(x)


def _positions(layer: CompressedLayer, row: int) -> list[list[int]]:
    heads: list[list[int]] = layer.storage().copy().padded(row)[2][0].tolist()
    return [[p for p in head if p >= 0] for head in heads]


def _noted_division(plain: Callable[..., Any], seen: Watched) -> Callable[..., Any]:
    """A division of the budget is clear if it is the same for one preference a little off."""

    def allocate(rule: Any, preference: list[float], *sizes: Any) -> Any:
        found = plain(rule, preference, *sizes)
        for value in set(preference) if rule.needs else ():  # others are constants
            for sign in (-1, 1):
                moved = [_off(x, sign) if x == value else x for x in preference]
                if (plain(rule, moved, *sizes) != found).any():
                    seen.tied = len(seen.logits) if seen.tied is None else seen.tied
        return found

    return allocate
