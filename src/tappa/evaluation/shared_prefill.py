"""Many methods and budgets answer one prompt, which is read once."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import tappa
from tappa.compression import (
    CompressedCache,
    Recording,
    check_method,
    stack_caches,
)
from tappa.evaluation.harness import TappaLM

Budget = int | float | None


@dataclass(frozen=True)
class Cell:
    """A method as it was written, `tappa(gamma=0.0)`, and a budget (None: nothing is dropped)."""

    method: str
    budget: Budget


class Held(NamedTuple):
    """What a cache held before it answered, and the time that making it took.

    `compress_seconds` is a cell's even share of the time in which its method scored the tokens of a
    prompt that was read, and gathered what stays, for all budgets at once.
    """

    tokens_held: float
    nbytes: int
    compress_seconds: float


def cells_of(methods: Sequence[str], budgets: Sequence[int | float]) -> list[Cell]:
    """All methods × budgets, each once; a method that drops nothing has a single cell.

    Raises CompressionError for an unknown method or option, or a budget that cannot work.
    """
    cells: list[Cell] = []
    for text in methods:
        for budget in budgets:
            _, checked = check_method(text, budget)
            cells.append(Cell(text, checked))
    return list(dict.fromkeys(cells))


class GridLM(TappaLM):
    """A model whose prompts are read once for all cells: set `now`, then ask.

    With several cells in `now` a prompt is to be asked as often as there are cells, all in one
    batch, of one prompt or of several: each row has the cache of its cell. Keeps what it read until
    `forget`. `prefill_seconds` and `prefills` add up.
    """

    halves = False  # the rows of a prompt belong together: the grid halves

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **options: Any
    ) -> None:
        self._encoded: dict[tuple[str, str], list[int]] = {}
        super().__init__(model, "full", tokenizer=tokenizer, **options)
        self.cells: list[Cell] = [Cell("full", None)]  # of the whole grid
        self.now = self.cells  # those that answer next
        self.prefill_seconds, self.prefills = 0.0, 0
        self.held: dict[Cell, list[Held]] = {}  # of each cache that was made
        self._recordings: dict[tuple[int, ...], Recording] = {}
        self._made: dict[tuple[tuple[int, ...], Cell], tuple[CompressedCache, float]] = {}

    def forget(self) -> None:
        """Let go of all prompts."""
        self._encoded.clear()
        self._recordings.clear()
        self._made.clear()
        self.held = {}

    def answering(self, cells: Sequence[Cell], prompts: int = 1) -> None:
        """These cells answer next, together, so many prompts in a batch."""
        self.now = list(cells)
        self.batch_size_per_gpu = len(self.now) * prompts

    def cache_of(
        self, ids: Int[Tensor, "rows tokens"], mask: Int[Tensor, "rows tokens"]
    ) -> CompressedCache:
        """The prompts' caches: the rows of a prompt are those of the cells at hand, in order."""
        prompts = [tuple(row[kept.bool()].tolist()) for row, kept in zip(ids, mask, strict=True)]
        if min(map(len, prompts)) < 2:
            return self.new_cache()
        met: Counter[tuple[int, ...]] = Counter()
        caches = []
        for prompt in prompts:
            cell = self.now[met[prompt] % len(self.now)]
            caches.append(self._take(prompt, cell))
            met[prompt] += 1
        assert not any(count % len(self.now) for count in met.values()), "a row for each cell"
        return caches[0] if len(caches) == 1 else stack_caches(caches)

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
        """Called by lm-eval for every request: each prompt is tokenized once."""
        key = (string, repr((args, sorted(kwargs.items()))))
        if key not in self._encoded:
            self._encoded[key] = super().tok_encode(string, *args, **kwargs)
        return self._encoded[key]

    def tok_batch_encode(
        self, strings: Sequence[str], *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by lm-eval for every batch: each prompt is tokenized once."""
        distinct = list(dict.fromkeys(strings))
        ids, mask = super().tok_batch_encode(distinct, *args, **kwargs)
        rows = [distinct.index(string) for string in strings]
        return ids[rows], mask[rows]

    def recording(self, tokens: tuple[int, ...]) -> Recording:
        """A prompt without its last token, read at the first call."""
        if tokens not in self._recordings:
            start = self._now()
            ids = torch.tensor([tokens[:-1]], device=self.device)
            self._recordings[tokens] = tappa.record(self.model, ids)
            self.prefill_seconds += self._now() - start
            self.prefills += 1
        return self._recordings[tokens]

    def _take(self, tokens: tuple[int, ...], cell: Cell) -> CompressedCache:
        """A prompt's cache in a cell, once. All budgets of a method are made at the first call."""
        if (tokens, cell) not in self._made:
            siblings = [other for other in self.cells if other.method == cell.method] or [cell]
            budgets = [other.budget for other in siblings]
            recording = self.recording(tokens)
            start = self._now()
            caches = recording.compress(cell.method, budgets)
            seconds = (self._now() - start) / len(siblings)
            for other, cache in zip(siblings, caches, strict=True):
                self._made[tokens, other] = cache, seconds
        cache, seconds = self._made.pop((tokens, cell))
        shards = cache.shards
        tokens_held = shards.total(cache.tokens_held()) / shards.ranks  # means over as many heads
        held = Held(tokens_held, int(shards.total(cache.nbytes)), seconds)
        self.held.setdefault(cell, []).append(held)
        return cache

    def _now(self) -> float:
        """Seconds, once the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
