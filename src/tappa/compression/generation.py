"""What users call: `compressed`, and `compress_context` for many questions on one text."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor, nn

from tappa.adapters import unwrapped
from tappa.analysis import Analysis, describe
from tappa.arguments import whole_number
from tappa.cache_argument import with_cache
from tappa.compression.budgets import Evidence, Rule
from tappa.compression.cache import CompressedCache, Recorded
from tappa.compression.layer import CompressedLayer
from tappa.compression.methods import Method, method_named
from tappa.compression.options import check_ids, check_padding
from tappa.compression.reading import read_in_pieces
from tappa.errors import CompressionError
from tappa.wording import byte_size, counted, described


def compressed(
    model: nn.Module,
    method: str | Method = "tappa",
    budget: int | float | None = None,
    *,
    analysis: Analysis | str | Path | None = None,
    every: int = 16,
    **options: Any,
) -> CompressedCache:
    """A KV cache that is held to a budget while the model reads and writes.

        with tappa.compressed(model, method="tappa", budget=512):
            model.generate(**inputs, max_new_tokens=200)

        cache = tappa.compressed(model, "snapkv", 0.1)
        model.generate(**inputs, cache=cache)  # past_key_values=cache before transformers 5.24

    `budget` is the number of tokens that each layer and KV head holds on average, or, as a float up
    to 1, a share of the prompt. `method` is a name of `tappa methods`, two of them as "a+b" (scores
    of a, budgets of b), or a `Method`; `options` are those of the method. With `analysis`, budgets
    come from a saved Analysis of this model and not from the prompt. While generating, tokens are
    dropped `every` so many steps.

    A model of peft will do where it is one of LoRA's kind. Raises CompressionError for what cannot
    work, ModelError for virtual tokens of prompt learning, before the model runs.
    """
    model = unwrapped(model)
    every = whole_number("every", every, 1, CompressionError)
    chosen, checked = check_method(method, budget, **options)
    saved = Analysis.load(analysis) if isinstance(analysis, str | Path) else analysis
    if saved is not None and not isinstance(saved, Analysis):
        came = described(analysis)
        raise CompressionError(f"expected an Analysis or the path of one, got {came}")
    cache = CompressedCache(model, chosen, checked, every)
    if saved is not None:
        if chosen.rule is None:
            raise CompressionError(f"{chosen.name} has no budgets to take from an Analysis")
        cache.fixed = _preferences(cache, saved, chosen.rule, chosen.name)
    return cache


def check_method(
    method: str | Method, budget: int | float | None, **options: Any
) -> tuple[Method, int | float | None]:
    """The method and its budget, before any model is loaded. Raises CompressionError."""
    chosen = method_named(method, **options)
    return chosen, None if chosen.rule is None else _checked(budget, chosen)


def parse_budget(text: str) -> int | float:
    """A budget out of text: `512` is tokens, `0.1` a share. Raises CompressionError."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise CompressionError(f"expected a budget such as 512 (tokens) or 0.1 (a share), got {text!r}")


class CompressedContext:
    """A text in a compressed cache, to be asked many questions: each on a copy of its own.

    context = tappa.compress_context(model, ids, "expected_attention", 512)
    model.generate(torch.cat([ids, question], 1), cache=context.cache())
    """

    def __init__(self, cache: CompressedCache) -> None:
        self._cache = cache

    def __repr__(self) -> str:
        return f"<CompressedContext in {self._cache!r}>"

    def cache(self) -> CompressedCache:
        """A copy of the context's cache; nothing more is dropped from it."""
        return self._cache.copy()

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values held."""
        return self._cache.nbytes

    @property
    def peak_nbytes(self) -> int:
        """The most bytes that were held while the text was read."""
        return self._cache.peak_nbytes

    @property
    def tokens_seen(self) -> int:
        """Tokens of the text."""
        return self._cache.tokens_seen


def compress_context(
    model: nn.Module,
    input_ids: Int[Tensor, "rows tokens"],
    method: str | Method = "tappa",
    budget: int | float | None = None,
    *,
    attention_mask: Int[Tensor, "rows tokens"] | None = None,
    chunk: int | None = None,
    **options: Any,
) -> CompressedContext:
    """Read a text once, without knowing the questions, and keep it compressed.

    With `chunk`, it is read in pieces of that many tokens. Other arguments as in `compressed`.
    """
    cache = compressed(model, method, budget, **options)
    check_ids(input_ids, cache.model)
    check_padding(attention_mask, input_ids)
    if chunk is not None:
        whole_number("chunk", chunk, 1, CompressionError)
    read_in_pieces(cache, input_ids, chunk or input_ids.shape[1], attention_mask)
    cache.frozen = True
    return CompressedContext(cache)


class Recording:
    """A prompt that was read once, as the start of many caches: for comparing methods and budgets.

        recording = tappa.record(model, ids)
        for cache in recording.compress("snapkv", [128, 256, 512]):
            model(next_ids, cache=cache)

    Holds the queries, keys and values of all layers. What a cache keeps is what `compressed` keeps
    when it reads the prompt in one piece.
    """

    def __init__(self, full: CompressedCache, queries: list[Recorded]) -> None:
        self._full, self._queries = full, queries

    def __repr__(self) -> str:
        full, name = self._full, type(self._full.model).__name__
        keys = f"{byte_size(full.nbytes)} of keys and values"
        queries = sum(query.numel() * query.element_size() for query, _ in self._queries)
        read = f"{counted(full.tokens_seen, 'token')}, {keys}, {byte_size(queries)} of queries"
        return f"<Recording of {name}: {read}>"

    def compress(
        self,
        method: str | Method,
        budgets: Sequence[int | float | None],
        **options: Any,
    ) -> list[CompressedCache]:
        """A cache for each budget. Tokens are scored once. Arguments as in `compressed`."""
        chosen = method_named(method, **{k: v for k, v in options.items() if k not in _OF_CACHE})
        if isinstance(budgets, str | bytes) or not isinstance(budgets, Iterable):
            raise CompressionError(f"expected a list of budgets, got {described(budgets)}")
        if chosen.rule is not None:
            budgets = [_checked(budget, chosen) for budget in budgets]
        made: list[CompressedCache] = []
        for budget in budgets:
            if not made:
                made.append(compressed(self._full.model, method, budget, **options))
                made[0].start_from(self._full, self._queries)
            else:
                made.append(made[0].copy(keep_ranks=True))
                made[-1].budget = budget
        for cache in made:
            cache.balance()
            for layer in cache.compressed_layers:
                layer.forget_ranks()
        return made


_OF_CACHE = ("analysis", "every")  # options of `compressed` that no method has


def record(model: nn.Module, input_ids: Int[Tensor, "rows tokens"]) -> Recording:
    """Read a prompt (or several of the same length) once, for `Recording.compress`."""
    full = compressed(model, "full")
    check_ids(input_ids, full.model)
    queries: list[Recorded] = []
    full.recorder = lambda query, rotary: queries.append((query, rotary))
    with torch.inference_mode():
        device = next(model.parameters()).device
        full.model(input_ids.to(device), logits_to_keep=1, **with_cache(full.model, full))
    full.recorder = None
    return Recording(full, queries)


def _checked(budget: int | float | None, method: Method) -> int | float:
    """The budget as an int of tokens or a float share, if it can work."""
    kind = "tokens (an int) or a share of the prompt (a float up to 1.0)"
    if isinstance(budget, str):
        raise CompressionError(f"expected a budget in {kind}, got the string {budget!r}")
    try:
        value = float(cast(Any, None if isinstance(budget, bool) else budget))
    except (TypeError, ValueError, RuntimeError):
        raise CompressionError(f"expected a budget in {kind}, got {described(budget)}") from None
    if not math.isfinite(value) or value <= 0:
        raise CompressionError(f"expected a budget above 0, in {kind}, got {budget!r}")
    if not hasattr(budget, "__index__"):
        if value > 1:
            raise CompressionError(f"expected a share of at most 1.0, got {value}; {kind}")
        return value
    if value < method.least:
        raise CompressionError(
            f"expected a budget of at least {method.least} tokens, which {method.name} always "
            f"keeps (window {method.window}, sinks {method.sinks}), got {int(value)}"
        )
    return int(value)


def _preferences(
    cache: CompressedCache, analysis: Analysis, rule: Rule, name: str
) -> list[list[float]]:
    """The preference of every compressed layer and KV head, by figures of an Analysis."""
    theirs, ours = analysis.model, describe(cache.model)
    for key in ("class", "layers", "heads", "kv_heads"):
        if theirs[key] != ours[key]:
            raise CompressionError(
                f"the Analysis is of another model: {key} is {theirs[key]} there and {ours[key]} "
                f"here ({theirs['name']} and {ours['name']})"
            )
    rule = rule.calibrated or rule
    if "window" in rule.needs:
        raise CompressionError(
            f"{name} takes its budgets from the attention of the prompt, not from an Analysis"
        )
    frame = analysis.to_frame()
    layers = enumerate(cache.layers)
    numbers = [number for number, layer in layers if isinstance(layer, CompressedLayer)]
    out = []
    for index, number in enumerate(numbers):
        groups = frame[frame["layer"] == number].groupby("kv_head")
        similarity = groups[f"q_similarity_{rule.variant}"].mean()
        known = {
            "similarity": torch.tensor(similarity.to_numpy(float)),
            "predictability": torch.tensor(groups["predictability"].min().to_numpy(float)),
        }
        out.append(rule.prefer(Evidence(index, len(numbers), len(similarity), **known)))
    return out
