"""Queries and keys of every attention layer, while the model runs and without changing it.

A function registered with transformers' AttentionInterface stands in for the model's own kernel:
it hands one layer's post-RoPE queries and keys to a callback and then calls that kernel, so logits
stay bit-identical. Nothing is patched, and everything is put back even when the callback raises.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from tappa.adapters import unwrapped
from tappa.attention_profile import Attention
from tappa.cache_argument import cache_among, with_cache
from tappa.errors import CaptureError, ModelError
from tappa.head_counts import shares_keys
from tappa.interface import AttentionSwitch, attention_of
from tappa.rope import RotaryChannels
from tappa.rotary_probe import RotaryProbe
from tappa.tensor_parallel import HeadShards


@dataclass(frozen=True)
class LayerView:
    """One attention layer on one chunk of one prompt, padding cut off.

    Query t stands at position `query_start + t` of the prompt, key i at `key_start + i`.
    """

    layer: int
    row: int  # which prompt of the batch
    model_queries: Float[Tensor, "heads steps dim"]  # post-RoPE, in the model's type
    model_keys: Float[Tensor, "kv_heads past dim"]
    rotary: RotaryChannels
    attention: Attention
    query_start: int
    key_start: int
    shards: HeadShards = field(default_factory=HeadShards)  # whose heads these are

    @cached_property
    def queries(self) -> Float[Tensor, "heads steps dim"]:
        """Post-RoPE, float32."""
        return self.model_queries.float()

    @cached_property
    def keys(self) -> Float[Tensor, "kv_heads past dim"]:
        """Post-RoPE, float32."""
        return self.model_keys.float()

    @cached_property
    def queries_before(self) -> Float[Tensor, "heads steps dim"]:
        """Before RoPE, float32."""
        return self.rotary.unrotate_from(self.queries, self.query_start)

    @cached_property
    def keys_before(self) -> Float[Tensor, "kv_heads past dim"]:
        """Before RoPE, float32."""
        return self.rotary.unrotate_from(self.keys, self.key_start)


Consumer = Callable[[LayerView], None]


def prefill(
    model: nn.Module,
    input_ids: Int[Tensor, "batch tokens"],
    consume: Consumer,
    attention_mask: Int[Tensor, "batch tokens"] | None = None,
    chunk: int | None = None,
    logits_to_keep: int = 0,
) -> Tensor:
    """Run the model over prompts and call `consume` once for every layer, chunk and prompt.

    Padding (left or right, by `attention_mask`) is cut off before `consume` sees a layer. With
    `chunk`, the prompt goes in pieces of that many tokens with a KV cache, so that activations
    need memory for one piece only; then there can be no padding. Returns the logits of the last
    piece, of the last `logits_to_keep` tokens if the model can leave out the others (0: all).

    Raises:
        CaptureError: the model's attention is not what the analysis understands.
    """
    model = unwrapped(model)
    device = next(model.parameters()).device
    input_ids = input_ids.to(device)
    if attention_mask is not None and bool(attention_mask.all()):
        attention_mask = None
    if chunk is not None and attention_mask is not None:
        raise CaptureError("expected prompts without padding for a chunked prefill")
    with torch.inference_mode(), _capturing(model, consume) as session:
        session.logits_to_keep = logits_to_keep
        if chunk is None or chunk >= input_ids.shape[1]:
            return session.forward(input_ids, attention_mask).logits
        out = None
        for piece in input_ids.split(chunk, dim=1):
            out = session.go_on(piece, out)
        assert out is not None
        return out.logits


@dataclass
class _Session:
    """State of one capture: what is running, and what is known of each layer."""

    model: PreTrainedModel
    consume: Consumer
    probe: RotaryProbe
    switch: AttentionSwitch = field(init=False)
    shards: HeadShards = field(init=False)
    start: int = 0  # tokens seen before this forward pass
    spans: list[tuple[int, int]] = field(default_factory=list)  # unpadded part of each prompt
    positions: Tensor = field(default_factory=lambda: torch.empty(0))
    frequencies: dict[nn.Module, Tensor] = field(default_factory=dict)
    layers_seen: set[int] = field(default_factory=set)  # in this forward pass
    logits_to_keep: int = 0

    def __post_init__(self) -> None:
        self.switch = AttentionSwitch(self.model, self.attend)
        self.shards = HeadShards.of(self.model)

    def go_on(self, ids: Tensor, before: Any) -> Any:
        """The next piece of a prompt, with the cache that the model made for those before."""
        if before is None:
            return self.forward(ids, None, use_cache=True)
        cache = cache_among(before)
        if cache is None:
            name = type(self.model).__name__
            raise CaptureError(f"{name} returns no KV cache: analyse in one piece (chunk=None)")
        return self.forward(ids, None, cache, use_cache=True)

    def forward(
        self, ids: Tensor, mask: Tensor | None, cache: Any = None, use_cache: bool = False
    ) -> Any:
        """One forward pass, with explicit positions that do not count padding."""
        tokens = ids.shape[1]
        valid = torch.ones_like(ids) if mask is None else mask.to(ids.device)
        self.spans = [_span(row) for row in valid.bool()]
        self.positions = (valid.cumsum(1) - 1).clamp_min(0) + self.start
        self.layers_seen = set()
        keep = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        out = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=self.positions,
            use_cache=use_cache,
            **with_cache(self.model, cache),
            **({"logits_to_keep": self._kept(tokens)} if keep else {}),
        )
        if not self.layers_seen:
            raise ModelError(
                f"{type(self.model).__name__} does not use transformers' attention interface: "
                "its queries and keys cannot be seen"
            )
        self.start += tokens
        return out

    def _kept(self, tokens: int) -> int | Tensor:
        """Whose logits are wanted, as the model is told.

        By their places, where a number would make layers that read others' keys leave out the rest.
        """
        if not self.logits_to_keep or not shares_keys(self.model):
            return self.logits_to_keep
        return torch.arange(max(tokens - self.logits_to_keep, 0), tokens)

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor | None]:
        """In place of the model's attention kernel: show the layer to `consume`, then call it."""
        if self.probe.probing:
            return self.probe.answer(query, key, value)
        kernel = self.switch.own_kernel(module)
        output = kernel(module, query, key, value, attention_mask, **kwargs)
        self._show(module, query, key, attention_mask, kwargs)
        return output

    def _show(
        self, module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict
    ) -> None:
        attention = attention_of(module, query, kwargs)
        rotary = self._rotary(module)
        layer, tokens = int(cast(int, module.layer_idx)), self.positions.shape[1]
        if query.shape[2] != tokens:
            raise CaptureError(f"layer {layer}: expected {tokens} queries, got {query.shape[2]}")
        if layer in self.layers_seen:
            raise ModelError(
                f"layer {layer} ({type(module).__name__}) attends more than once in a forward "
                "pass, which tappa cannot analyse"
            )
        self.layers_seen.add(layer)
        seen = self.start + query.shape[2]
        for row, (first, last) in enumerate(self.spans):
            pad = 0 if self.start else first
            end = key.shape[2] - (query.shape[2] - last)
            view = LayerView(
                layer=layer,
                row=row,
                model_queries=query[row, :, first:last],
                model_keys=key[row, :, pad:end],
                rotary=rotary.to(query.device),
                attention=attention,
                query_start=self.start,
                key_start=seen - key.shape[2],
                shards=self.shards,
            )
            _check_mask(mask, view, first, pad)
            self.consume(view)

    def _rotary(self, module: nn.Module) -> RotaryChannels:
        """The rotary channels of a layer, which must not change between chunks."""
        row = max(range(len(self.spans)), key=lambda r: self.spans[r][1] - self.spans[r][0])
        tokens = slice(*self.spans[row])
        rotary = self.probe.channels(module, row, tokens, self.positions[row, tokens])
        known = self.frequencies.setdefault(module, rotary.theta)
        if known is not rotary.theta and not torch.equal(known, rotary.theta):
            raise CaptureError(
                "RoPE frequencies changed between chunks (dynamic scaling): "
                "analyse this prompt in one piece (chunk=None)"
            )
        return rotary


@contextmanager
def _capturing(model: PreTrainedModel, consume: Consumer) -> Iterator[_Session]:
    """Switch the model to the capture, and put everything back."""
    session = _Session(model, consume, RotaryProbe(model))
    session.switch.on()
    hooks = session.probe.hooks()
    try:
        yield session
    finally:
        session.switch.off()
        for hook in hooks:
            hook.remove()


def _span(valid: Tensor) -> tuple[int, int]:
    """First and last + 1 of the tokens that are no padding, which must be in one piece."""
    at = valid.nonzero()[:, 0]
    if len(at) == 0 or int(at[-1] - at[0]) + 1 != len(at):
        raise CaptureError("expected padding on the left or on the right of a prompt only")
    return int(at[0]), int(at[-1]) + 1


def _check_mask(mask: Tensor | None, view: LayerView, first: int, pad: int) -> None:
    """Compare a few rows of the model's own mask with the one the analysis assumes."""
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise CaptureError(f"expected a mask as a tensor, the kernel takes a {type(mask).__name__}")
    if mask.dim() != 4:
        return
    steps, past = view.queries.shape[1], view.keys.shape[1]
    rows = torch.tensor(sorted({0, steps // 2, steps - 1}), device=mask.device)
    allowed = mask[view.row if len(mask) > 1 else 0, 0, first + rows, pad : pad + past]
    allowed = allowed if allowed.dtype == torch.bool else allowed == 0
    columns = torch.arange(past, device=mask.device) + view.key_start
    if not torch.equal(allowed, view.attention.visible(rows + view.query_start, columns)):
        raise CaptureError(
            f"layer {view.layer}: expected a causal or sliding-window mask, the model uses another"
        )
