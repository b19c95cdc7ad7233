"""The rotary channels of every attention layer, learnt from the model while it runs."""

import copy
import inspect
import threading
from collections.abc import Callable, MutableMapping
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from tappa.cache_argument import NAMES
from tappa.errors import CaptureError, ModelError
from tappa.hooks import add_hook, of_this_thread
from tappa.rope import RotaryChannels, RotaryLayout, match_frequencies, probe_layout
from tappa.without_weights import WithoutWeights

TOKENS = 8  # of the probe's own runs
CACHE_ARGUMENTS = {*NAMES, "past_key_value", "layer_past"}
POSITION_ARGUMENTS = {"position_ids", "cache_position"}


# What a module's code does with its tables does not change: known layouts serve later probes.
_LAYOUTS: WeakKeyDictionary[nn.Module, RotaryLayout] = WeakKeyDictionary()
_learning = threading.Lock()  # writes to it


class RotaryProbe:
    """Sees the RoPE tables that go into each attention layer, and runs it once on made-up ones.

    The attention function in use must ask `probing` first, and return `answer(...)` while it holds.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.modules = [
            module
            for module in model.modules()
            if "position_embeddings" in _signature(module).parameters
        ]
        self._rotary = [m for m in model.modules() if _inv_freqs(m)]
        self._know_nothing()

    def _know_nothing(self) -> None:
        self._tables: dict[nn.Module, tuple[Tensor, Tensor]] = {}  # cos, sin of this forward pass
        self.latest: inspect.BoundArguments | None = None  # call of the layer that runs now
        self._channels: dict[tuple[int, ...], tuple[Tensor, RotaryChannels]] = {}  # likewise
        self._unknown: dict[nn.Module, str] = {}  # why a module's layout is not known
        self._seen: list[tuple[Tensor, Tensor]] | None = None  # queries and keys of its own runs

    def renewed(self) -> "RotaryProbe":
        """One of the same model for other passes: it need not look at all modules again."""
        twin = copy.copy(self)
        twin._know_nothing()
        return twin

    def hooks(self) -> list[RemovableHandle]:
        """Watch this thread's forward passes of the model until these are removed."""
        see = of_this_thread(self._see)
        return [add_hook(m.register_forward_pre_hook, see, with_kwargs=True) for m in self.modules]

    def forget(self) -> None:
        """Let go of the tables and the arguments of the last forward pass."""
        self._tables.clear()
        self._channels.clear()
        self.latest = None

    @property
    def probing(self) -> bool:
        """Whether the call of an attention function is one of the probe's own."""
        return self._seen is not None

    def answer(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None]:
        """What the attention function returns to the probe: zeros of the right shape."""
        assert self._seen is not None
        self._seen.append((query, key))
        rows, heads, tokens, _ = query.shape
        return query.new_zeros(rows, tokens, heads, value.shape[-1]), None

    def channels(
        self, module: nn.Module, row: int, tokens: slice, positions: Int[Tensor, " tokens"]
    ) -> RotaryChannels:
        """The channels of a layer, with frequencies as they are in this forward pass.

        `positions` are those of the `tokens` of one row of the batch that the tables are for.
        """
        if module not in self._tables:
            raise ModelError(
                f"expected a model with rotary position embeddings (RoPE), but "
                f"{type(module).__name__} of {type(self.model).__name__} gets none"
            )
        if module not in _LAYOUTS:
            raise CaptureError(self._unknown[module])
        layout, table = _LAYOUTS[module], self._tables[module]
        key = (id(layout), id(table[0]), row, tokens.start, tokens.stop)
        if key not in self._channels:  # layers mostly share their tables
            cos, sin = (t[row if len(t) > 1 else 0, tokens] for t in table)
            # read now: dynamic scaling replaces the buffers
            buffers = [table for m in self._rotary for table in _inv_freqs(m)]
            theta = match_frequencies(cos, sin, positions, buffers)
            channels = layout.channels(theta).to(cos.device)
            self._channels[key] = table[0], channels  # keeps the table's id taken
        return self._channels[key][1]

    def _see(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before a module that takes `position_embeddings`: learn its rotary layout, once."""
        if self.probing:
            return
        call = _signature(module).bind(*args, **kwargs)
        table = call.arguments.get("position_embeddings")
        self._tables.pop(module, None)
        if table is None or not hasattr(module, "layer_idx"):
            return
        if not (isinstance(table, tuple) and len(table) == 2 and table[0].is_floating_point()):
            raise CaptureError(
                f"expected RoPE tables (cos, sin), {type(module).__name__} takes another form"
            )
        self._tables[module] = table
        if _is_attention(module):
            self.latest = call
            if module not in _LAYOUTS and (layout := self._probe(module, call)) is not None:
                _learn(module, layout)

    def _probe(self, module: nn.Module, call: inspect.BoundArguments) -> RotaryLayout | None:
        """Learn a layer's layout from its attention module alone, without its weights.

        None where that fails, which matters only if the module calls an attention function: one of
        linear attention does not, for example.
        """
        hidden, (like, _) = call.arguments["hidden_states"], call.arguments["position_embeddings"]
        arguments = _made_up(call)

        def run(cos: Tensor, sin: Tensor, seed: int) -> tuple[Tensor, Tensor]:
            self._seen = []
            random.restart(seed)
            noise = torch.randn(1, len(cos), hidden.shape[-1], generator=random.generator)
            tables = tuple(t[None].to(like) for t in (cos, sin))
            made_up = {"hidden_states": noise.to(hidden), "position_embeddings": tables}
            module.forward(**(arguments | made_up))
            if not self._seen:
                raise _NoAttention
            queries, keys = self._seen[0]
            return queries[0], keys[0]

        place = f"layer {getattr(module, 'layer_idx', '?')} ({type(module).__name__})"
        try:
            with torch.no_grad(), WithoutWeights(module) as random:
                return _layout(run, like.shape[-1])
        except _NoAttention:
            self._unknown[module] = f"{place} calls no attention function when it is run alone"
            return None
        except (CaptureError, ModelError) as error:
            raise type(error)(f"{place}: {error}") from error
        except Exception as error:
            message = str(error).splitlines()[0] if str(error) else type(error).__name__
            self._unknown[module] = f"{place}: its RoPE cannot be learned: {message}"
            return None
        finally:
            self._seen = None


def _learn(module: nn.Module, layout: RotaryLayout) -> None:
    with _learning:  # another thread must not add one while this one looks at all
        _LAYOUTS[module] = next((k for k in _LAYOUTS.values() if k.same_as(layout)), layout)


class _NoAttention(Exception):
    """No attention function was called."""


# (cos, sin, seed of the random numbers) -> queries and keys: (heads, tokens, dim)
Run = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


def _layout(run: Run, columns: int) -> RotaryLayout:
    """The layout of a layer's queries, which must be that of its keys.

    NaN in the tables shows what comes after RoPE. Keys that neither it nor other random numbers
    change are those of another layer.
    """
    nan = torch.full((TOKENS, columns), torch.nan)
    one, zero = torch.ones_like(nan), torch.zeros_like(nan)
    _, elsewhere = run(nan, nan, 2)
    layout = probe_layout(lambda cos, sin: run(cos, sin, 1)[0], columns, TOKENS)
    if torch.equal(run(one, zero, 1)[1], elsewhere):
        return layout
    of_keys = probe_layout(lambda cos, sin: run(cos, sin, 1)[1], columns, TOKENS)
    if not layout.same_as(of_keys):
        raise CaptureError("its RoPE turns queries and keys in different ways")
    return layout


def _made_up(call: inspect.BoundArguments) -> dict[str, Any]:
    """The arguments of a call for a few tokens of their own: no cache, first positions."""
    arguments: dict[str, Any] = {}
    for name, value in call.arguments.items():
        keywords = call.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        arguments |= value if keywords else {name: value}
    arguments |= dict.fromkeys(arguments.keys() & CACHE_ARGUMENTS)
    # layers may leave their keys to others in a dictionary: in a copy here
    arguments |= {k: copy.copy(v) for k, v in arguments.items() if isinstance(v, MutableMapping)}
    device = call.arguments["hidden_states"].device
    for name in POSITION_ARGUMENTS & arguments.keys():
        arguments[name] = torch.arange(TOKENS, device=device)[None]
    return arguments | {"attention_mask": _mask_of_all(arguments.get("attention_mask"))}


def _mask_of_all(mask: object) -> Tensor | None:
    """A mask of the same type under which all tokens see each other; None where it is no matrix."""
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return None
    shape = 1, 1, TOKENS, TOKENS
    return mask.new_ones(shape) if mask.dtype == torch.bool else mask.new_zeros(shape)


def _signature(module: nn.Module) -> inspect.Signature:
    """Of its forward, without `self`."""
    function = getattr(module.forward, "__func__", None)
    return inspect.signature(module.forward) if function is None else _signature_of(function)


@lru_cache(maxsize=1024)
def _signature_of(function: Callable) -> inspect.Signature:
    """Of a method, which takes long to find out."""
    signature = inspect.signature(function)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def _inv_freqs(module: nn.Module) -> list[Tensor]:
    """The tables of rotary frequencies of a module (several if layer types differ)."""
    return [
        buffer
        for name, buffer in module.named_buffers(recurse=False)
        if name.endswith("inv_freq") and "original" not in name
    ]


def _is_attention(module: nn.Module) -> bool:
    """An attention module, and not a decoder layer around one."""
    return hasattr(module, "scaling") or hasattr(module, "head_dim")
