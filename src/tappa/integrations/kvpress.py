"""NVIDIA's kvpress: its presses as our scorers, our layer budgets as one of its presses.

Needs kvpress 0.5.5, which wants transformers below 5.3: `pip install kvpress==0.5.5`.
"""

import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    Cache,
    Gemma3ForConditionalGeneration,
    PreTrainedModel,
    QuantizedCache,
)

from tappa.attention_profile import Attention
from tappa.cache_argument import cache_among
from tappa.compression import scorers
from tappa.compression.budgets import Evidence, Rule, allocate
from tappa.compression.methods import Method, method_named
from tappa.compression.observation import Observation
from tappa.compression.scorers import Scorer, Scores, TokenView
from tappa.compression.selection import head_ranks
from tappa.errors import CompressionError
from tappa.hooks import add_hook, remove_all

try:
    from kvpress import (  # type: ignore[import-not-found, unused-ignore]
        BasePress,
        ObservedAttentionPress,
        ScorerPress,
    )
    from kvpress.utils import (  # type: ignore[import-not-found, unused-ignore]
        compute_n_kept,
        get_prerope_query_states,
    )
except ImportError as error:
    raise CompressionError(
        f"expected kvpress, which wants transformers below 5.3: pip install kvpress==0.5.5; {error}"
    ) from error


# ---- a press as a scorer


def scorer_of(press: BasePress, model: PreTrainedModel | None = None) -> Scorer:
    """The scores of a kvpress ScorerPress, for a `Method` of ours.

        method = Method(scorer_of(KnormPress()), budgets.similarity())
        context = tappa.compress_context(model, ids, method, 512)

    Presses that look into the model (ExpectedAttentionPress needs its RoPE) want `model` too. A
    press scores one whole prompt: use it where the prompt is read in one go, unpadded, one row at
    a time, and where nothing is dropped while writing, as with `compress_context`. Anything else,
    and a press that needs attention weights, raises CompressionError. The press's own
    `compression_ratio` is not used for how many tokens stay, only by scores that depend on it
    (StreamingLLMPress).
    """
    if not isinstance(press, ScorerPress):
        raise CompressionError(f"expected a kvpress ScorerPress, got {type(press).__name__}")
    if isinstance(press, ObservedAttentionPress):
        raise CompressionError(
            "ObservedAttentionPress needs attention weights, which tappa's cache never holds; "
            "method 'h2o' sums them as it goes"
        )
    if model is not None:
        press.post_init_from_model(model)
    rotary = None if model is None else _decoder(model).rotary_emb

    def score(tokens: TokenView) -> Scores:
        call = _prompt_call(press, tokens)
        with _lent_rotary(tokens.module, rotary):
            return _scores(press, tokens, call)

    return Scorer(score, frozenset({"call"}))


def _scores(press: ScorerPress, tokens: TokenView, call: dict[str, Any]) -> Scores:
    """`press.score` on one row. Raises CompressionError for what the press refuses."""
    tensors = call["hidden_states"], tokens.keys[None], tokens.values[None]
    try:
        return press.score(tokens.module, *tensors, None, call)[0].float()
    except (AssertionError, AttributeError, KeyError) as error:
        hint = "; pass scorer_of the model" if "rotary_emb" in str(error) else ""
        raise CompressionError(
            f"{type(press).__name__} cannot score this prompt: {error}{hint}"
        ) from error


def _prompt_call(press: ScorerPress, tokens: TokenView) -> dict[str, Any]:
    """Arguments of the attention module's forward, if the tokens held are one whole prompt."""
    name = type(press).__name__
    if tokens.call is None:
        raise CompressionError(
            f"{name} scores prompts only, not tokens held while writing: use compress_context, "
            "or a budget with room for what will be written"
        )
    call = flat_arguments(tokens.call)
    rows, new, _ = call["hidden_states"].shape
    if rows != 1:
        raise CompressionError(f"{name} takes prompts one at a time, got {rows} rows")
    whole = torch.arange(new, device=tokens.positions.device).expand(len(tokens.keys), -1)
    if not torch.equal(tokens.positions.to(whole), whole):
        raise CompressionError(
            f"{name} needs the whole prompt in one go, without padding and before anything is "
            f"dropped; got {new} new tokens, {tokens.positions.shape[1]} are held"
        )
    return call


def flat_arguments(call: inspect.BoundArguments) -> dict[str, Any]:
    """All arguments of a call by name, those of `**kwargs` included."""
    out: dict[str, Any] = {}
    for name, value in call.arguments.items():
        keywords = call.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        out |= value if keywords else {name: value}
    return out


def _decoder(model: PreTrainedModel) -> Any:
    """The module with the layers and the RoPE, found as kvpress finds it."""
    return getattr(model.model, "language_model", model.model)


@contextmanager
def _lent_rotary(module: nn.Module | None, rotary: nn.Module | None) -> Iterator[None]:
    """`module.rotary_emb`, where kvpress looks for RoPE, set for a while."""
    if module is None or rotary is None or hasattr(module, "rotary_emb"):
        yield
        return
    module.rotary_emb = rotary
    try:
        yield
    finally:
        del module.rotary_emb


# ---- our budgets as a press


@dataclass
class _Seen:
    """What is kept of a layer until the last one has run."""

    module: nn.Module
    ranks: Int[Tensor, "rows kv_heads tokens"]
    preference: float

    @property
    def layer(self) -> int:
        """The layer's place in the cache."""
        return cast(int, self.module.layer_idx)


@dataclass
class TappaPress(BasePress):
    """Scores of any kvpress ScorerPress, tokens divided among the layers by tappa's budgets.

        press = TappaPress(SnapKVPress(window_size=32), compression_ratio=0.7)
        pipeline("kv-press-text-generation", model=...)(context, question=..., press=press)

    `method` names where layer budgets come from: a name of `tappa methods`, a `Method`, or a `Rule`
    of tappa.compression.budgets. Its window and sinks always stay; its scorer and its sharing among
    heads are not used: transformers' DynamicCache is dense, so all heads of a layer (and rows of a
    batch) hold equally many tokens. All layers together hold at most
    `layers * int(tokens * (1 - compression_ratio))` tokens per head, or the window and sinks of
    every layer where that is more.

    Memory: budgets need to know all layers, so every layer's full keys and values stay until the
    last layer has run. The peak while the prompt is read is that of an uncompressed cache, unlike
    with `tappa.compressed`; only what is held afterwards is smaller.

    transformers makes one attention mask, for as many tokens as the first layer holds. While the
    cut cache lives, hooks on the model bring it to each layer's length, for that cache only.

    Raises CompressionError for quantized caches and for layers that do not hold the whole prompt.
    """

    press: BasePress  # a ScorerPress
    compression_ratio: float = 0.0
    method: str | Method | Rule = "tappa"
    _waiting: list[_Seen] = field(default_factory=list, init=False, repr=False, compare=False)
    _layers: int = field(default=0, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.press, ScorerPress):
            raise CompressionError(f"expected a ScorerPress, got {type(self.press).__name__}")
        if not 0 <= self.compression_ratio < 1:
            raise CompressionError(
                f"expected a compression_ratio from 0 to below 1, got {self.compression_ratio}"
            )
        self._method_and_rule()

    def post_init_from_model(self, model: PreTrainedModel) -> None:
        """Prepare the press that scores, and count the layers."""
        self.press.post_init_from_model(model)
        self.press.compression_ratio = self.compression_ratio  # some scores depend on it
        layers = _decoder(model).layers
        if isinstance(model, Gemma3ForConditionalGeneration):  # kvpress leaves the others alone
            layers = [layer for layer in layers if not layer.self_attn.is_sliding]
        self._layers = len(layers)
        self._waiting = []

    def compress(
        self,
        module: nn.Module,
        hidden_states: Float[Tensor, "rows tokens hidden"],
        keys: Float[Tensor, "rows kv_heads tokens dim"],
        values: Float[Tensor, "rows kv_heads tokens dim"],
        attentions: Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """Rank the tokens of a layer; after the last layer, cut all of them."""
        if self.compression_ratio == 0:
            return keys, values
        cache, layer = cache_among(kwargs), cast(int, module.layer_idx)
        if isinstance(cache, QuantizedCache):
            raise CompressionError("TappaPress cuts all layers at the end: no quantized caches")
        if keys.shape[2] != hidden_states.shape[1]:
            raise CompressionError(
                f"expected a layer that holds all {hidden_states.shape[1]} tokens of the prompt, "
                f"layer {layer} holds {keys.shape[2]}"
            )
        if self._waiting and layer <= self._waiting[-1].layer:  # the pass before has failed
            self._waiting = []
        scores = self.press.score(module, hidden_states, keys, values, attentions, kwargs)
        self._waiting.append(self._see(module, hidden_states, keys, values, scores, kwargs))
        if len(self._waiting) < self._layers:
            return keys, values
        seen, self._waiting = self._waiting, []
        counts = self._counts([one.preference for one in seen], keys.shape[2])
        for one, count in zip(seen[:-1], counts[:-1], strict=True):
            held = cache.layers[one.layer]
            held.keys, held.values = (_cut(x, one.ranks, count) for x in (held.keys, held.values))
        _fit_masks(cache, [one.module for one in seen])
        return _cut(keys, seen[-1].ranks, counts[-1]), _cut(values, seen[-1].ranks, counts[-1])

    def _method_and_rule(self) -> tuple[Method, Rule]:
        """What `method` stands for."""
        given, blind = self.method, scorers.recency()
        known = Method(blind, given) if isinstance(given, Rule) else method_named(given)
        if known.rule is None:
            raise CompressionError(f"{known.name} has no layer budgets")
        return replace(known, scorer=blind), known.rule

    def _see(
        self,
        module: nn.Module,
        hidden_states: Float[Tensor, "rows tokens hidden"],
        keys: Float[Tensor, "rows kv_heads tokens dim"],
        values: Float[Tensor, "rows kv_heads tokens dim"],
        scores: Float[Tensor, "rows kv_heads tokens"],
        kwargs: dict[str, Any],
    ) -> _Seen:
        """Ranks of the tokens, and the layer's preference: over rows and heads together."""
        method, rule = self._method_and_rule()
        before = get_prerope_query_states(module, hidden_states)
        after = _rotated(before, *kwargs["position_embeddings"])
        blank = Evidence(len(self._waiting), self._layers, keys.shape[1])
        attention, preference, ranks = _attention(module, before), 0.0, []
        for row in range(len(keys)):
            seen = _observed(before[row], after[row], method, rule)
            positions = torch.arange(keys.shape[2], device=keys.device).expand(keys.shape[1], -1)
            tokens = TokenView(
                *(keys[row], values[row], positions, seen.end, attention),
                *(seen.window, seen.window_positions),
                module=module,
            )
            preference += sum(rule.prefer(seen.evidence(blank, rule, tokens)))
            late = positions >= seen.end - method.window
            protected = late | (positions < method.sinks)
            ranks.append(head_ranks(scores[row].float(), protected, tokens.present))
        return _Seen(module, torch.stack(ranks), preference)

    def _counts(self, preferences: list[float], tokens: int) -> list[int]:
        """Tokens that each head of each layer holds."""
        method, rule = self._method_and_rule()
        layers, average = len(preferences), compute_n_kept(tokens, self.compression_ratio)
        least = max(method.least, int(method.layer_floor * average))
        total = layers * max(average, method.least)
        return allocate(rule, preferences, total, least, [tokens] * layers).tolist()


def _observed(
    before: Float[Tensor, "heads tokens dim"],
    after: Float[Tensor, "heads tokens dim"],
    method: Method,
    rule: Rule,
) -> Observation:
    """What a rule may ask about the queries of a prompt, before and after RoPE."""
    positions = torch.arange(before.shape[1], device=before.device)
    seen = Observation.empty(after, 0)
    seen.see(after, positions, method.window, len(positions))
    # without channels, learn() takes queries as they are: hand it those the rule asks for
    seen.learn(before if rule.variant.space == "pre" else after, positions, method.scorer, rule)
    return seen


def _attention(module: nn.Module, queries: Float[Tensor, "rows heads tokens dim"]) -> Attention:
    """How a layer attends, by the attributes that transformers gives its attention modules."""
    scale = getattr(module, "scaling", queries.shape[-1] ** -0.5)
    softcap = getattr(module, "attn_logit_softcapping", None)
    return Attention(scale, getattr(module, "sliding_window", None), softcap)


def _rotated(
    queries: Float[Tensor, "rows heads tokens dim"],
    cos: Float[Tensor, "#rows tokens rotary"],
    sin: Float[Tensor, "#rows tokens rotary"],
) -> Float[Tensor, "rows heads tokens dim"]:
    """RoPE in the layout of Llama, as in all models that kvpress supports: halves are pairs."""
    size = cos.shape[-1]
    turned, rest = queries[..., :size], queries[..., size:]
    first, second = turned.chunk(2, -1)
    other = torch.cat([-second, first], -1)
    return torch.cat([turned * cos[:, None] + other * sin[:, None], rest], -1)


def _cut(
    x: Float[Tensor, "rows kv_heads tokens dim"],
    ranks: Int[Tensor, "rows kv_heads tokens"],
    count: int,
) -> Float[Tensor, "rows kv_heads count dim"]:
    """The `count` tokens of lowest rank of every head, in their order."""
    return x[ranks < count].view(*x.shape[:2], count, x.shape[-1])


def _fit_masks(cache: Cache, modules: list[nn.Module]) -> None:
    """While a cache lives, bring the masks of its layers to what each of them holds."""
    fit = _mask_fitter(weakref.ref(cache))
    handles = [add_hook(m.register_forward_pre_hook, fit, with_kwargs=True) for m in modules]
    weakref.finalize(cache, remove_all, handles)


def _mask_fitter(cache: "weakref.ref[Cache]") -> Callable[..., Any]:
    """A hook before attention modules: all tokens of this cache are visible to the new ones.

    Among themselves, the new tokens see what the mask says.
    """

    def fit(
        module: nn.Module, args: tuple, kwargs: dict | None = None
    ) -> tuple[tuple, dict] | None:
        if kwargs is None:  # while another thread adds this hook, or removes it
            return None
        mask, held = kwargs.get("attention_mask"), cache_among(kwargs)
        if held is None or cache() is not held or not torch.is_tensor(mask):
            return None
        new = kwargs["hidden_states"].shape[1]
        past = cast(Any, held).layers[module.layer_idx].keys.shape[2]
        if mask.shape[-1] == past + new:
            return None
        before = mask.new_full((*mask.shape[:-1], past), mask.dtype == torch.bool)
        return args, kwargs | {"attention_mask": torch.cat([before, mask[..., -new:]], -1)}

    return fit
