"""A transformers Cache that really drops tokens, and remembers their true positions.

Layers hold ragged keys and values (storage). After each layer's attention the cache sees its
queries, scores the tokens and divides the whole budget among the layers seen so far: at any moment
the budget and one layer's full keys and values are held, at most.
"""

import copy
import threading
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from tappa.cache_argument import cache_among, rename_cache
from tappa.compression.budgets import Evidence, allocate
from tappa.compression.claim import Claim
from tappa.compression.fit import check_expansion, check_mask
from tappa.compression.history import History, watch_prompts
from tappa.compression.key_flow import NO_LAYERS, KeyFlow
from tappa.compression.layer import CompressedLayer, by_segment
from tappa.compression.methods import Method
from tappa.compression.newest import NewestTokens
from tappa.compression.observation import Observation
from tappa.compression.options import check_ids
from tappa.compression.rereading import check_border, reads_anew
from tappa.compression.scorers import received_by
from tappa.compression.serving import served_by, start_serving, stop_serving
from tappa.errors import CompressionError
from tappa.fetching import Fetched
from tappa.hooks import LateHook, add_hook, remove_all
from tappa.interface import AttentionSwitch, attention_of
from tappa.models import require_rope
from tappa.rope import RotaryChannels
from tappa.rotary_probe import RotaryProbe
from tappa.tensor_parallel import HeadShards
from tappa.wording import byte_size, counted

Recorded = tuple[Tensor, RotaryChannels]  # queries of a layer (rows, heads, tokens, dim), its RoPE
Recorder = Callable[[Tensor, RotaryChannels], None]
KERNELS = ("sdpa", "eager", "flash_attention_2")


class CompressedCache(DynamicCache):
    """The KV cache of a model, held to a budget. Made by `tappa.compressed`.

    Use it as a context manager, in which every new prompt starts with an empty cache, or hand it
    to the model as `cache` (before transformers 5.24: `past_key_values`). `budget` is in tokens per
    layer and KV head on average, or a share of the prompt. While the model runs on this cache, and
    only then, its attention kernel is wrapped, for the thread that runs it; everything is put back
    after each forward pass. Several threads may run the model, each on a cache of its own. It is
    for inference: no gradient flows through keys and values.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        method: Method,
        budget: int | float | None,
        every: int = 16,
    ) -> None:
        if not getattr(model, "_supports_attention_backend", False):
            raise CompressionError(
                f"{type(model).__name__} does not use transformers' attention interface: "
                "its cache cannot be compressed"
            )
        needs = method.scorer.needs | (method.rule.needs if method.rule else set())
        self._wants_rotary = bool(needs & {"moments", "similarity"})
        self._watches = self._wants_rotary or "call" in needs
        if self._wants_rotary:
            require_rope(model)
        super().__init__(config=model.config)
        self.model, self.method, self.budget, self.every = model, method, budget, every
        self.fixed: list[list[float]] | None = (
            None  # preference of each compressed layer and KV head, from an Analysis
        )
        self.frozen = False  # nothing is dropped any more
        self._used = False  # since `with` was entered
        self.recorder: Recorder | None = None  # is shown the queries of a whole prompt
        self._known_rotary: RotaryChannels | None = None
        self.shards = HeadShards.of(model)
        self.peak_nbytes = 0
        self.history = History()
        known = {DynamicLayer, DynamicSlidingWindowLayer, *NO_LAYERS}
        kinds = {type(layer) for layer in self.layers} - known
        if kinds:
            names = ", ".join(sorted(kind.__name__ for kind in kinds))
            raise CompressionError(
                f"expected layers with full or sliding-window attention, {type(model).__name__} "
                f"has {names}"
            )
        full = [i for i, layer in enumerate(self.layers) if type(layer) is DynamicLayer]
        if not full:
            raise CompressionError(
                f"all layers of {type(model).__name__} use a sliding window: nothing to compress"
            )
        for index, layer in enumerate(full):
            self.layers[layer] = CompressedLayer(index, method, self.shards)
        self._connect(AttentionSwitch(model, LateHook(self._attend)), RotaryProbe(model))

    def _connect(self, switch: AttentionSwitch, probe: RotaryProbe) -> None:
        """Watch the model's forward passes for as long as this cache lives."""
        self.switch, self._probe = switch, probe
        self._hooks: list[RemovableHandle] = []
        self._flow = KeyFlow(self.model)
        self._asked_in: int | None = None  # thread that asked whether it is empty, and ran no model
        self._valid: Tensor | None = None  # of the new tokens: no padding
        self._position_ids: Tensor = torch.empty(0)
        self._newest = NewestTokens()
        self._counted: dict[int, tuple[list[int], int, int]] = {}  # edits, seen and held of a row
        self._unbalanced = False  # the layer read last is still whole
        self._failed = self._running = False
        self.claim, self._thread = Claim(), 0  # that runs the model on it
        before, after = LateHook(self._before), LateHook(self._after)
        handles: tuple[RemovableHandle, ...] = (
            add_hook(self.model.register_forward_pre_hook, before, with_kwargs=True, prepend=True),
            add_hook(self.model.register_forward_hook, after, with_kwargs=True, always_call=True),
        )
        weakref.finalize(self, remove_all, handles)
        watch_prompts(self)

    # ---- what users call

    def __repr__(self) -> str:
        budget = "" if self.method.rule is None else f", budget {self.budget}"
        what = f"{type(self).__name__} of {type(self.model).__name__}: {self.method.name}{budget}"
        seen = self.tokens_seen
        if not seen:
            return f"<{what}; nothing read>"
        rows = self.compressed_layers[0].rows
        batch = f" in {rows} rows" if rows > 1 else ""
        held = f"{self.tokens_held():,.1f} of {counted(seen, 'token')} held{batch}"
        return f"<{what}; {held}, {byte_size(self.nbytes)}>"

    def __enter__(self) -> "CompressedCache":
        self._used = False
        start_serving(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        stop_serving(self)
        if kind is None and not self._used:
            warnings.warn(
                f"nothing was compressed: {type(self.model).__name__} read no prompt with a KV "
                "cache inside this `with`",
                stacklevel=2,
            )

    def reset(self) -> None:
        """Forget everything, ready for another prompt."""
        with self.claim:
            super().reset()
            self.peak_nbytes = 0
            self.history = History()
            self.frozen = self._failed = False

    @property
    def compressed_layers(self) -> list[CompressedLayer]:
        """The layers that are compressed: all but those with a sliding window."""
        return [layer for layer in self.layers if isinstance(layer, CompressedLayer)]

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values held, sliding-window layers included."""
        other = [layer for layer in self.layers if isinstance(layer, DynamicSlidingWindowLayer)]
        tensors = [x for layer in other for x in (layer.keys, layer.values) if x is not None]
        return sum(layer.nbytes for layer in self.compressed_layers) + sum(
            x.numel() * x.element_size() for x in tensors
        )

    @property
    def beside_nbytes(self) -> int:
        """Bytes of what is remembered beside keys and values: last queries, sums, positions."""
        return sum(layer.beside_nbytes for layer in self.compressed_layers)

    @property
    def full_nbytes(self) -> int:
        """Bytes that keys and values would take if nothing was dropped, of rows without padding."""
        layers = [layer for layer in self.compressed_layers if layer.held is not None]
        dropped = sum(
            layer.seen * len(layer.storage().lengths) * layer.storage().token_nbytes - layer.nbytes
            for layer in layers
        )
        return self.nbytes + dropped

    @property
    def tokens_seen(self) -> int:
        """Tokens that went through the model, padding included: the next token's position."""
        return self.compressed_layers[0].seen

    def tokens_held(self, layer: int | None = None, head: int | None = None, row: int = 0) -> float:
        """Tokens that one KV head of one layer holds; means over heads and layers if left out."""
        layers = self.compressed_layers if layer is None else [self._compressed(layer)]
        counts = [one.held.row_lengths(row) for one in layers if one.held is not None]
        chosen = [c for part in counts for c in (part if head is None else [part[head]])]
        return sum(chosen) / len(chosen) if chosen else 0.0

    def positions_held(self, layer: int, head: int, row: int = 0) -> list[int]:
        """Positions of the tokens that one KV head of one layer holds, oldest first."""
        held = self._compressed(layer).held
        return [] if held is None else [p for p in held.padded(row)[2][0, head].tolist() if p >= 0]

    def continues(self, input_ids: Int[Tensor, "rows tokens"]) -> bool:
        """Whether a whole text begins with the tokens that this cache has seen, and goes on.

        True of any text while nothing was seen. If False, call `reset()` before `generate`.
        """
        check_ids(input_ids, self.model)
        seen = self.tokens_seen
        fits = not seen or self.compressed_layers[0].rows == len(input_ids)
        return fits and input_ids.shape[1] > seen and self.history.difference(input_ids) is None

    def copy(self, keep_ranks: bool = False) -> "CompressedCache":
        """An independent copy, to be used as the `cache` of the same model."""
        if self._running and not self._runs_here:
            self.claim.refuse()
        twin = object.__new__(CompressedCache)
        twin.__dict__.update(self.__dict__)
        twin.layers = [
            layer.copy(keep_ranks) if isinstance(layer, CompressedLayer) else copy.copy(layer)
            for layer in self.layers
        ]
        twin.recorder, twin.peak_nbytes = None, self.nbytes
        twin.history = self.history.copy()
        twin._connect(self.switch.renewed(LateHook(twin._attend)), self._probe.renewed())
        return twin

    def __deepcopy__(self, memo: dict) -> "CompressedCache":
        return self.copy()

    def __copy__(self) -> "CompressedCache":
        return self.copy()

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Take back the last tokens, a draft that was rejected."""
        try:
            super().crop(*args, **kwargs)
        except ValueError as error:  # of the layers that are not compressed
            raise CompressionError(
                f"{type(self.model).__name__} has layers with a sliding window, which take back no "
                f"token in transformers {transformers.__version__}: {error}"
            ) from error
        self.history.cut(self.tokens_seen)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows for beam search."""
        super().reorder_cache(cast(Any, beam_idx))
        self.history.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Take rows of the batch, by index or by a mask."""
        super().batch_select_indices(indices)
        self.history.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        self.history.repeat(repeats)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by the model with the new keys and values of a layer."""
        if not self._running:
            raise CompressionError(
                "this cache was made for another model (or for all of it, and got a part): "
                "make one with tappa.compressed(model, ...)"
            )
        self._settle()
        key_states, value_states = key_states.detach(), value_states.detach()
        pair = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self._flow.returned(layer_idx, pair)
        return pair

    def __bool__(self) -> bool:
        """True, as of other caches. Models ask it before they throw a cache away."""
        self._asked_in = threading.get_ident()
        return True

    def _compressed(self, layer: int) -> CompressedLayer:
        found = self.layers[layer]
        if not isinstance(found, CompressedLayer):
            raise CompressionError(f"layer {layer} has a sliding window and is not compressed")
        return found

    # ---- around a forward pass

    @property
    def _runs_here(self) -> bool:
        return self._running and self._thread == threading.get_ident()

    def _before(
        self, model: nn.Module, args: tuple, kwargs: dict | None = None
    ) -> tuple[tuple, dict] | None:
        if kwargs is None:  # of another thread, while this cache is made or goes
            return None
        if self._runs_here:  # Ctrl-C has cut the last pass of this thread short
            self._after(model, args, None)
        given, asked = cache_among(kwargs), self._asked_in == threading.get_ident()
        starts = served_by(model) is self and _starts_prompt(given, kwargs)
        if not starts and given is None and asked:
            mask, ids = kwargs.get("attention_mask"), _inputs(args, kwargs)
            starts = reads_anew(self.model, self.tokens_seen, self.frozen, ids, mask)
        if starts:
            self.reset()
            given = self
        if asked:
            self._asked_in = None
        if given is not self:
            return None
        self.claim.take()
        try:
            return self._start(model, args, kwargs)
        finally:
            if not self._running:  # it was refused
                self.claim.give_back()

    def _start(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        self._used = True
        kwargs = _only_new(rename_cache(model, kwargs, self), self.tokens_seen)
        ids = _inputs(args, kwargs)
        if ids is None:
            raise CompressionError("expected input_ids or inputs_embeds")
        self._check(ids, kwargs.get("attention_mask"))
        new, seen = ids.shape[1], self.tokens_seen
        self.history.note(ids, seen, self._valid)
        given_ids = kwargs.get("position_ids")
        arange = torch.arange(seen, seen + new, device=ids.device)[None]
        self._position_ids = arange if given_ids is None else given_ids
        self._newest = NewestTokens(arange[0])
        if self.evicting and seen and new < self._prompt_like:
            self.make_room(new)
        self.switch.on()
        self._running, self._thread = True, threading.get_ident()
        reading = self.evicting and (new >= self._prompt_like or not seen)
        if (reading and self._watches) or self.recorder is not None:
            self._hooks = self._probe.hooks()
        return args, kwargs

    def _after(self, model: nn.Module, args: tuple, *rest: object) -> None:
        if not self._runs_here:
            return
        output = rest[-1]  # behind `kwargs`, which may be missing
        try:
            self._finish(output)
        finally:
            self.claim.give_back()

    def _finish(self, output: object) -> None:
        self._running = False
        self.switch.off()
        remove_all(self._hooks)
        self._failed = output is None
        self._settle()
        self._hooks, self._position_ids, self._newest = [], torch.empty(0), NewestTokens()
        self._probe.forget()
        self.peak_nbytes = max(self.peak_nbytes, self.nbytes)
        self.__dict__.pop("shared_layers", None)  # where Gemma 3n leaves keys for later layers
        for layer in self.compressed_layers:
            layer.forget_ranks()
        try:
            if output is not None:
                self._flow.check_all_read(self.layers, self.tokens_seen)
        except CompressionError:
            self._failed = True
            raise
        finally:
            self._flow.forget()

    def _check(self, ids: Tensor, mask: Tensor | None) -> None:
        """Refuse what would give wrong results, before anything runs."""
        new, seen = ids.shape[1], self.tokens_seen
        if self._failed:
            raise CompressionError("the last forward pass on this cache failed: call reset() first")
        check_border(self.model, seen, seen + new)
        implementation = self.switch.wrapped
        if implementation not in KERNELS:
            raise CompressionError(
                f"expected attention by {', '.join(KERNELS)}, the model uses {implementation!r}"
            )
        rows = self.compressed_layers[0].rows
        if rows not in (0, len(ids)):
            raise CompressionError(
                f"the cache holds {rows} row(s), {len(ids)} came: call reset() before "
                "another prompt, batch_repeat_interleave() to go on in several ways"
            )
        shape = None if mask is None else tuple(mask.shape)
        if new == 0:
            raise CompressionError(
                f"expected new tokens after the {seen} that the cache has seen, got none: call "
                "reset() before another prompt"
            )
        if shape is not None and shape != (len(ids), seen + new):
            raise CompressionError(
                f"the cache has seen {seen} tokens and {new} came, with an attention mask of shape "
                f"{shape}: call reset() before another prompt"
            )
        valid = None if mask is None else mask[:, -new:].bool()
        if valid is not None and not seen and not bool(valid.any(1).all()):
            raise CompressionError("expected at least one token in every row, one is all padding")
        self._valid = None if valid is None or bool(valid.all()) else valid

    @property
    def evicting(self) -> bool:
        return self.method.rule is not None and not self.frozen

    @property
    def _prompt_like(self) -> int:
        """As many new tokens at once are taken for a piece of the prompt, and compressed."""
        return max(self.method.window, 2)

    def _is_prompt(self, layer: CompressedLayer, new: int) -> bool:
        """Whether so many tokens, which the layer has got, are a piece of the prompt."""
        return layer.seen == new or new >= self._prompt_like

    def _attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """In place of the model's attention kernel: call it on the tokens held, then compress."""
        if self._probe.probing:
            return self._probe.answer(query, key, value)
        kernel = self.switch.own_kernel(module)
        layer, first = self._flow.layer_of(self.layers, module, key, value)
        if layer is None:
            return kernel(module, query, key, value, attention_mask, **kwargs)
        if layer.expansion is not None:
            check_expansion(module, self.switch.wrapped, self.shards.ranks)
        if first:
            layer.attention, layer.module = attention_of(module, query, kwargs), module
        if self.evicting or self._valid is not None or not layer.whole:
            check_mask(attention_mask)
        if self.evicting and self._valid is None and self._is_prompt(layer, query.shape[2]):
            self._ask_rotary(layer, query.shape[2])
        if query.shape[2] == 1 and (own := layer.attend(query)) is not None:
            output: tuple[Tensor, Tensor | None] = (own, None)
        elif layer.split or (self.switch.wrapped.startswith("flash") and not layer.whole):
            output = (by_segment(kernel, layer, module, query, (key, value), kwargs), None)
        else:
            mask = layer.mask_for(attention_mask, query)
            output = kernel(module, query, key, value, mask, **kwargs)
        if first:
            self._learn(layer, query.detach())
        return output

    @torch.no_grad()
    def _learn(self, layer: CompressedLayer, query: Tensor) -> None:
        """What new queries are for, once they have attended."""
        if self.recorder is not None:
            self.recorder(query, self._channels(layer, 0, slice(0, query.shape[2])))
        if self.evicting:
            self.observe(layer, query)
        elif self._valid is not None:
            layer.drop_padding(self._valid.to(query.device))

    # ---- compression

    def start_from(self, full: "CompressedCache", recorded: list[Recorded]) -> None:
        """Take over a prompt that a full cache has read, and compress it in one go."""
        for number, (mine, theirs) in enumerate(zip(self.layers, full.layers, strict=True)):
            if not isinstance(mine, CompressedLayer):
                self.layers[number] = copy.copy(theirs)
        layers = self.compressed_layers
        self._valid = None
        for mine, theirs, (query, rotary) in zip(
            layers, full.compressed_layers, recorded, strict=True
        ):
            mine.held, mine.seen = theirs.storage().copy(), theirs.seen
            mine.attention, mine.module, mine.is_initialized = theirs.attention, theirs.module, True
            mine.expansion, mine.plain, mine.kv_heads = (
                theirs.expansion,
                theirs.plain,
                theirs.kv_heads,
            )
            self._known_rotary = rotary
            if self.evicting:
                self.observe(mine, query, cascade=False)
        self._known_rotary, self._newest = None, NewestTokens()
        self.peak_nbytes = full.nbytes
        self.history = full.history.copy()

    def balance(self) -> None:
        """Cut all layers to the budget."""
        for row in range(len(self.compressed_layers[0].observations)):
            self._balance(row, self.total(row))

    def observe(self, layer: CompressedLayer, query: Tensor, cascade: bool = True) -> None:
        """Remember what the method needs of the new queries; compress after a piece of prompt.

        Without `cascade` nothing is dropped yet.
        """
        new, valid = query.shape[2], self._valid
        valid = None if valid is None else valid.to(query.device)
        start, prompt = layer.seen - new, self._is_prompt(layer, new)
        if prompt:
            self.peak_nbytes = max(self.peak_nbytes, self.nbytes)
        if valid is not None:
            layer.drop_padding(valid)
        if len(self._newest) != new:  # outside of a forward pass
            self._newest = NewestTokens(torch.arange(start, start + new, device=query.device))
        everywhere = self._newest.positions(query.device)
        for row, queries in enumerate(query):
            positions, tokens = everywhere, slice(0, new)
            if valid is not None and not bool(valid[row].all()):
                queries, positions = queries[:, valid[row]], everywhere[valid[row]]
                there = valid[row].nonzero()[:, 0].tolist() or [0, -1]
                tokens = slice(there[0], there[-1] + 1)
            if len(positions):
                self._observe_row(layer, row, queries, positions, tokens, prompt)
        if prompt:
            self._compress(layer)
            self._unbalanced = cascade

    def _observe_row(
        self,
        layer: CompressedLayer,
        row: int,
        queries: Float[Tensor, "heads new dim"],
        positions: Int[Tensor, " new"],
        tokens: slice,
        prompt: bool,
    ) -> None:
        """`tokens` are the new ones from the first that is no padding to the last."""
        method, rule, held = self.method, self.method.rule, layer.storage()
        assert rule is not None
        if len(layer.observations) <= row:
            first = layer.seen - len(self._newest) + tokens.start
            layer.observations.append(Observation.empty(queries, first))
        seen = layer.observations[row]
        end = layer.seen - len(self._newest) + tokens.stop
        seen.see(queries, positions, method.window, end)
        if prompt:
            table = None
            if self._wants_rotary:
                seen.rotary = self._channels(layer, row, tokens)
                table = self._newest.table(seen.rotary, positions)
            seen.learn(queries, positions, method.scorer, rule, table)
        if "received" in method.scorer.needs:
            if "received" not in held.figures:
                held.figures["received"] = torch.zeros(len(held.keys), device=queries.device)
            more = received_by(layer.view(row), queries, positions)
            if layer.expansion is not None:
                more = layer.expansion.mean(more)
            held.set_figure("received", row, held.figure("received", row) + more)

    def _channels(self, layer: CompressedLayer, row: int, tokens: slice) -> RotaryChannels:
        """RoPE of a layer, from the tables of this forward pass."""
        if self._known_rotary is not None:
            return self._known_rotary
        assert layer.module is not None
        ids = self._position_ids[row if len(self._position_ids) > 1 else 0, tokens]
        return self._probe.channels(layer.module, row, tokens, ids)

    def _ask_rotary(self, layer: CompressedLayer, new: int) -> None:
        """Have RoPE ready before attention: at first, the CPU waits for what a GPU has to do."""
        if self._wants_rotary:
            rotary = self._channels(layer, 0, slice(0, new))
            self._newest.table(rotary, self._newest.positions(rotary.theta.device))

    def _compress(self, layer: CompressedLayer) -> None:
        """Rank the tokens of a layer and set its preference."""
        rule, layers = self.method.rule, self.compressed_layers
        assert rule is not None
        held = layer.storage()
        expansion, gather = layer.expansion, self.shards.gather
        kv_heads = held.kv_heads if expansion is None else len(expansion.heads)
        blank = Evidence(layer.index, len(layers), kv_heads)
        preferences: list[Fetched | list[float]] = []
        for row, seen in enumerate(layer.observations):
            tokens = replace(layer.view(row), call=self._probe.latest)
            layer.rank(row, tokens)
            if self.fixed is not None:
                fixed = self.fixed[layer.index]
                fits = expansion is not None and len(fixed) == kv_heads
                preferences.append(expansion.mean_of(fixed) if expansion and fits else fixed)
            else:
                evidence = seen.evidence(blank, rule, tokens).over(gather, self.shards.ranks)
                weights = rule.weigh(evidence)
                preferences.append(Fetched(expansion.mean(weights) if expansion else weights))
        layer.preferences = preferences

    @torch.compiler.disable
    def _settle(self) -> None:
        """Cut the layers to the budget, the one read last included.

        As late as the next layer needs the room: by then the GPU has told its figures, and works on
        what comes between two attentions while the CPU decides.
        """
        if self._unbalanced:
            self._unbalanced = False
            self.balance()

    def total(self, row: int) -> int:
        """Tokens that all heads of all layers may hold together."""
        assert self.budget is not None
        heads = sum(self._kv_heads())
        if isinstance(self.budget, int):
            return self.budget * heads
        each = self.budget * self.compressed_layers[0].observations[row].prompt_tokens
        return max(int(each * heads), self.method.least * heads)

    def _kv_heads(self) -> list[int]:
        """KV heads of every layer, of all ranks; layers to come are taken to be like the first."""
        layers = self.compressed_layers
        return [(each.kv_heads or layers[0].kv_heads) * self.shards.ranks for each in layers]

    def make_room(self, new: int) -> None:
        """Before new tokens come, drop as many that the budget holds with them, in one go for
        `every` tokens.
        """
        layers = self.compressed_layers
        heads = sum(self._kv_heads())
        for row in range(layers[0].storage().rows):
            total = self.total(row)
            if self._count(row) + new * heads > total:
                room = total - max(new, self.every) * heads
                self._balance(row, max(room, self.method.least * heads))
        for layer in self.compressed_layers:
            layer.forget_ranks()

    def _balance(self, row: int, total: int) -> None:
        """Divide a total among the layers seen so far, and cut those that hold more."""
        layers = [layer for layer in self.compressed_layers if len(layer.preferences) > row]
        held = self._lengths(layers, row)
        if sum(sum(counts) for counts in held) <= total:
            return
        pooled = self.method.sharing == "pooled"
        if pooled:  # a layer is one account
            held = [[sum(counts)] for counts in held]
        for layer, counts, limits in zip(layers, held, self.divide(row, held, total), strict=True):
            if sum(limits) < sum(counts):
                layer.cut(row, limits if pooled else self.shards.mine(limits))

    def divide(self, row: int, held: list[list[int]], total: int) -> list[list[int]]:
        """A total for the accounts of the layers seen so far: KV heads, or all of a layer as one.

        `held` is what each account holds, by layer; so is the result what it may hold.
        """
        rule, heads = self.method.rule, self._kv_heads()
        assert rule is not None
        layers = [layer for layer in self.compressed_layers if len(layer.preferences) > row]
        preferences: list[list[float]] = [layer.preference(row) for layer in layers]
        least = max(self.method.least, int(self.method.layer_floor * (total / sum(heads))))
        leasts = [[least] * len(each) for each in preferences]
        if self.method.sharing == "pooled":
            preferences = [[sum(each)] for each in preferences]
            leasts = [[sum(each)] for each in leasts]
        flat = [_flat(part) for part in (preferences, leasts, held)]
        tokens = iter(allocate(rule, flat[0], total, flat[1], flat[2]).tolist())
        return [[next(tokens) for _ in each] for each in held]

    def _count(self, row: int) -> int:
        """Tokens that all KV heads of all layers hold of a row.

        Ranks of a split model ask each other only after one has been dropped: new ones are known.
        """
        layers, seen = self.compressed_layers, self.tokens_seen
        edits = [layer.edits for layer in layers]
        if row not in self._counted or self._counted[row][0] != edits:
            held = sum(map(sum, self._lengths(layers, row)))
            self._counted[row] = edits, seen, held
        _, before, held = self._counted[row]
        heads = sum(layer.storage().kv_heads for layer in layers) * self.shards.ranks
        return held + (seen - before) * heads

    def _lengths(self, layers: list[CompressedLayer], row: int) -> list[list[int]]:
        """Tokens that each KV head of these layers holds, on other ranks of a split model too."""
        mine = [layer.storage().row_lengths(row) for layer in layers]
        if self.shards.ranks == 1 or not mine:
            return mine
        if len({len(counts) for counts in mine}) > 1:
            return [self.shards.gather(torch.tensor(counts)).tolist() for counts in mine]
        return self.shards.gather(torch.tensor(mine).mT).mT.tolist()


def _flat(parts: list[list[Any]]) -> list[Any]:
    return [x for part in parts for x in part]


def _inputs(args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """Token ids of a forward pass, or their embeddings."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    return kwargs.get("inputs_embeds") if ids is None else ids


def _starts_prompt(given: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a forward pass starts a prompt with a KV cache, and has none filled yet."""
    if given is None:
        return kwargs.get("use_cache") is not False
    return not isinstance(given, CompressedCache) and given.get_seq_length() == 0


def _only_new(kwargs: dict[str, Any], seen: int) -> dict[str, Any]:
    """The arguments of a forward pass without the tokens that the cache has seen.

    `generate` sends all tokens again where the model's generation config says `use_cache: false`.
    """
    ids, places = kwargs.get("input_ids"), kwargs.get("position_ids")
    if kwargs.get("use_cache") is not False or ids is None or places is None:
        return kwargs
    again = 0 < seen < ids.shape[1] == places.shape[-1] and int(places[..., 0].min()) <= 1
    late = {name: kwargs.get(name) for name in ("input_ids", "position_ids", "cache_position")}
    cut = {name: x[..., seen:] for name, x in late.items() if x is not None}
    return kwargs | cut if again else kwargs
