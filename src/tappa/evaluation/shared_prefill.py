"""Many methods and budgets answer one prompt, which is read once."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import tappa
from tappa.compression import CompressedCache, Recording, check_method, parse_method
from tappa.evaluation.harness import TappaLM

Budget = int | float | None


@dataclass(frozen=True)
class Cell:
    """A method as it was written, `tappa(gamma=0.0)`, and a budget (None: nothing is dropped)."""

    method: str
    budget: Budget


def cells_of(methods: Sequence[str], budgets: Sequence[int | float]) -> list[Cell]:
    """All methods × budgets, each once; a method that drops nothing has a single cell.

    Raises CompressionError for an unknown method or option, or a budget that cannot work.
    """
    cells: list[Cell] = []
    for text in methods:
        name, options = parse_method(text)
        for budget in budgets:
            _, checked = check_method(name, budget, **options)
            cells.append(Cell(text, checked))
    return list(dict.fromkeys(cells))


class GridLM(TappaLM):
    """A model whose prompts are read once for all cells: set `cell`, then ask.

    Keeps what it read until `forget`. `prefill_seconds` and `prefills` add up.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **options: Any
    ) -> None:
        super().__init__(model, "full", tokenizer=tokenizer, **options)
        self.cell = Cell("full", None)
        self.cells: list[Cell] = [self.cell]
        self.prefill_seconds, self.prefills = 0.0, 0
        self.used: list[tuple[float, int]] = []  # tokens held and bytes of each cache handed out
        self._recordings: dict[tuple[int, ...], Recording] = {}
        self._made: dict[tuple[tuple[int, ...], Cell], CompressedCache] = {}

    def forget(self) -> None:
        """Let go of all prompts."""
        self._recordings.clear()
        self._made.clear()
        self.used.clear()

    def cache_of(
        self, ids: Int[Tensor, "rows tokens"], mask: Int[Tensor, "rows tokens"]
    ) -> CompressedCache:
        """The prompt's cache in the cell at hand; there is one prompt at a time."""
        assert len(ids) == 1, "the grid answers one prompt at a time"
        tokens = tuple(ids[0].tolist())
        if len(tokens) < 2:
            return self.new_cache()
        if (tokens, self.cell) not in self._made:
            self._compress(tokens)
        cache = self._made.pop((tokens, self.cell))
        self.used.append((cache.tokens_held(), cache.nbytes))
        return cache

    def recording(self, tokens: tuple[int, ...]) -> Recording:
        """A prompt without its last token, read at the first call."""
        if tokens not in self._recordings:
            start = time.perf_counter()
            ids = torch.tensor([tokens[:-1]], device=self.device)
            self._recordings[tokens] = tappa.record(self.model, ids)
            self.prefill_seconds += time.perf_counter() - start
            self.prefills += 1
        return self._recordings[tokens]

    def _compress(self, tokens: tuple[int, ...]) -> None:
        """Caches of all budgets of the method at hand: its scores are computed once."""
        self._made = {key: cache for key, cache in self._made.items() if key[0] != tokens}
        siblings = [cell for cell in self.cells if cell.method == self.cell.method]
        siblings = [self.cell, *(cell for cell in siblings if cell != self.cell)]
        name, options = parse_method(self.cell.method)
        budgets = [cell.budget for cell in siblings]
        caches = self.recording(tokens).compress(name, budgets, **options)
        for cell, cache in zip(siblings, caches, strict=True):
            self._made[tokens, replace(cell)] = cache
