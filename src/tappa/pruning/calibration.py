"""What pruning needs to know of a model: sums over windows of text, in one pass each."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tappa.adapters import unwrapped
from tappa.analysis import describe
from tappa.arguments import check_callable, path_of
from tappa.capture import LayerView, prefill
from tappa.checkpoint import fingerprint, first_line
from tappa.errors import NonFiniteError, PruningError
from tappa.files import digest_of, write_atomic
from tappa.hooks import add_hook, of_this_thread, remove_all
from tappa.pruning.structure import (
    attention_in,
    decoder_layers,
    output_projection,
    query_heads_of,
)
from tappa.pruning.windows import Windows
from tappa.similarity import self_similarity
from tappa.tensor_parallel import HeadShards, local
from tappa.wording import counted, described

SCHEMA = "tappa.calibration/1"
EVERY = 4  # windows whose sums are added up first, then merged and written
_ARRAYS = ("cosines", "similarity", "output")
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Calibration:
    """Sums over windows of text: O(1) memory in the amount of text, and `a.merge(b)` is both.

    - `cosines`: of each layer, sum over tokens of cos(x_in, x_out) of its hidden states
    - `similarity`: of each query head, sum over windows of q-similarity before RoPE
    - `output`: of each query head, sum over tokens of `|W_o,h o_h| / |x_in|`
    """

    model: dict[str, Any]
    settings: dict[str, int]
    windows: int
    tokens: int
    cosines: Float[np.ndarray, " layers"]
    similarity: Float[np.ndarray, "layers heads"]
    output: Float[np.ndarray, "layers heads"]

    def __repr__(self) -> str:
        layers, heads = self.similarity.shape
        size = f"{counted(layers, 'layer')}, {counted(layers * heads, 'head')}"
        read = f"{counted(self.tokens, 'token')} in {counted(self.windows, 'window')}"
        return f"<Calibration of {self.model['name']}: {size}; {read}>"

    @property
    def block_influence(self) -> Float[np.ndarray, " layers"]:
        """`BI = 1 - mean cos(x_in, x_out)`. Source: ShortGPT (arXiv 2403.03853), eq. 1."""
        return 1 - self.cosines / self.tokens

    @property
    def q_similarity(self) -> Float[np.ndarray, "layers heads"]:
        """S of every query head before RoPE, all pairs of a window, mean over windows."""
        return self.similarity / self.windows

    @property
    def layer_similarity(self) -> Float[np.ndarray, " layers"]:
        """S of every layer, mean over its query heads."""
        return self.q_similarity.mean(1)

    @property
    def head_output(self) -> Float[np.ndarray, "layers heads"]:
        """Mean over tokens of `|W_o,h o_h| / |x_in|`: what a head adds, in shares of what is there.

        Not of `|W_o,h o_h|` alone: the residual stream grows by orders of magnitude from the first
        layer to the last, and a head of the first would always look unimportant.
        """
        return self.output / self.tokens

    def merge(self, other: "Calibration") -> "Calibration":
        """The calibration on both sets of windows. Raises PruningError where they do not fit."""
        if not isinstance(other, Calibration):
            raise PruningError(f"expected a Calibration to merge with, got {described(other)}")
        for name in ("model", "settings"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise PruningError(f"cannot merge: {name} differs, {mine} and {theirs}")
        sums = {
            name: getattr(self, name) + getattr(other, name)
            for name in ("windows", "tokens", *_ARRAYS)
        }
        return Calibration(self.model, self.settings, **sums)

    def save(self, path: str | Path) -> Path:
        """Write one JSON file, atomically. Raises OutputError."""
        content = asdict(self) | {name: getattr(self, name).tolist() for name in _ARRAYS}
        return write_atomic(path, json.dumps({"schema": SCHEMA} | content, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Calibration":
        """Read a file written by `save`. Raises PruningError for what is none."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content.pop("schema", None) != SCHEMA:
                raise PruningError(f"expected schema {SCHEMA!r} in {path}")
            arrays: dict[str, Any] = {k: np.array(content.pop(k), float) for k in _ARRAYS}
            found = cls(**content, **arrays)
            layers = found.model["layers"], found.model["heads"]
            fits = found.similarity.shape == found.output.shape == layers
            if not fits or found.cosines.shape != layers[:1] or found.windows < 1:
                raise PruningError(f"incomplete calibration {path}")
        except PruningError:
            raise
        except Exception as error:  # missing, not JSON, not an object, other fields
            raise PruningError(
                f"cannot read the calibration {path}: {first_line(error)}"
            ) from error
        return found


def calibrate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: str | Path | Sequence[str | Path],
    *,
    window: int = 1024,
    stride: int = 256,
    limit: int | None = None,
    state: str | Path | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Block influence and q-similarity of every layer, over windows of texts.

    Windows are `window` tokens long and start every `stride` tokens; of many, `limit` are taken,
    evenly spread. With `state`, sums are written to that file every few windows, and a run that
    was interrupted goes on from there.

        calibration = tappa.calibrate(model, tokenizer, text, limit=32)
        calibration.block_influence, calibration.layer_similarity

    Raises:
        TextError, ModelError, CaptureError, NonFiniteError, PruningError: one line each.
    """
    model = unwrapped(model)
    state = None if state is None else path_of(state, PruningError)
    check_callable("progress", progress)
    windows = Windows.of(model, tokenizer, texts, window=window, stride=stride, limit=limit)
    return calibrate_on(model, windows, state=state, progress=progress)


def calibrate_on(
    model: PreTrainedModel,
    windows: Windows,
    *,
    state: str | Path | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """`calibrate` on windows of token ids."""
    known: Calibration | None = None
    identity = identity_of(model, windows) if state is not None else ""
    if state is not None and Path(state).is_file():
        known = resume(Path(state), identity, model, windows)
    total = len(windows.ids)
    for start in range(known.windows if known is not None else 0, total, EVERY):
        ids = windows.ids[start : start + EVERY]
        found = calibrate_piece(model, ids, windows.settings, start, total, progress)
        known = found if known is None else known.merge(found)
        if state is not None:
            keep(known, Path(state), identity)
    if progress is not None:
        progress(total, total)
    assert known is not None  # Windows.of refuses to return none
    return known


def calibrate_piece(
    model: PreTrainedModel,
    ids: Sequence[list[int]],
    settings: dict[str, int],
    start: int = 0,
    total: int = 0,
    progress: Progress | None = None,
) -> Calibration:
    """The calibration on at most EVERY windows, the unit in which sums are merged.

    They are the `start`-th and following ones of `total`.
    """
    sums = _Sums(model)
    for number, window in enumerate(ids, start):
        if progress is not None:
            progress(number, total)
        sums.see(window)
    return sums.calibration(settings)


def identity_of(model: PreTrainedModel, windows: Windows) -> str:
    """What decides a calibration."""
    return digest_of(windows.digest, fingerprint(model))


def keep(known: Calibration, state: Path, identity: str) -> None:
    """Write what is known so far, to be taken up by `resume`. Raises OutputError."""
    known.save(state)
    write_atomic(_notes(state), json.dumps({"windows": identity, "done": known.windows}))


def _notes(state: Path) -> Path:
    return state.with_name(state.name + ".progress")


def resume(state: Path, identity: str, model: PreTrainedModel, windows: Windows) -> Calibration:
    """What a run with this state knew. Raises PruningError where it is of other work."""
    found = Calibration.load(state)
    notes = _notes(state)
    try:
        content = json.loads(notes.read_text(encoding="utf-8"))
        same = content["windows"] == identity and content["done"] == found.windows
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    here = describe(model)
    same = same and {**found.model, "name": ""} == {**here, "name": ""}  # it may lie elsewhere now
    if not same or found.settings != windows.settings:
        raise PruningError(
            f"{state} is of another model, other texts or other windows: choose another file, "
            "or delete it"
        )
    return replace(found, model=here)


@dataclass
class _Sums:
    """The sums so far, and the hooks that see a forward pass."""

    model: PreTrainedModel
    windows: int = 0
    tokens: int = 0
    cosines: Tensor = field(init=False)
    similarity: Tensor = field(init=False)
    output: Tensor = field(init=False)

    def __post_init__(self) -> None:
        layers, heads = decoder_layers(self.model), query_heads_of(self.model)
        heads //= HeadShards.of(self.model).ranks
        self.cosines = torch.zeros(len(layers), dtype=torch.float64)
        self.similarity = torch.zeros(len(layers), heads, dtype=torch.float64)
        self.output = torch.zeros(len(layers), heads, dtype=torch.float64)

    def see(self, ids: Sequence[int]) -> None:
        """One window: one forward pass."""

        def consume(view: LayerView) -> None:
            self.similarity[view.layer] += self_similarity(view.queries_before).cpu()

        with _watching(self.model, self.cosines, self.output):
            prefill(self.model, torch.tensor([list(ids)]), consume, logits_to_keep=1)
        self.windows += 1
        self.tokens += len(ids)
        for name in _ARRAYS:
            if not bool(getattr(self, name).isfinite().all()):
                raise NonFiniteError(f"NaN or infinity in the {name} of a layer")

    def calibration(self, settings: dict[str, int]) -> Calibration:
        """What was seen."""
        gather = HeadShards.of(self.model).gather
        arrays = {name: gather(getattr(self, name).mT).mT.numpy() for name in _ARRAYS[1:]}
        arrays["cosines"] = self.cosines.numpy()
        return Calibration(describe(self.model), settings, self.windows, self.tokens, **arrays)


@contextmanager
def _watching(model: PreTrainedModel, cosines: Tensor, output: Tensor) -> Iterator[None]:
    """Hooks that add up what this thread sees: each layer's change, and each head's part in it."""
    handles: list[RemovableHandle] = []
    for number, layer in enumerate(decoder_layers(model)):
        seen = _SeenLayer(cosines, output, number)
        projection = output_projection(attention_in(layer))
        before, heads = of_this_thread(seen.before), of_this_thread(seen.heads)
        after = of_this_thread(seen.after)
        handles += [
            add_hook(layer.register_forward_pre_hook, before, with_kwargs=True),
            add_hook(layer.register_forward_hook, after),
            add_hook(projection.register_forward_pre_hook, heads),
        ]
    try:
        yield
    finally:
        remove_all(handles)


@dataclass
class _SeenLayer:
    """One layer in one forward pass: its input, then its heads' outputs, then its output."""

    cosines: Tensor
    output: Tensor
    number: int
    x: Tensor = field(default_factory=lambda: torch.empty(0))

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """The hidden states that come in."""
        self.x = (args[0] if args else kwargs["hidden_states"]).float()

    def heads(self, module: nn.Module, args: tuple) -> None:
        """What the output projection gets."""
        assert isinstance(module, nn.Linear)
        if args[0].shape[:-1] != self.x.shape[:-1]:
            return  # the capture tries the module alone, on zeros
        parts = args[0].float().flatten(0, -2).unflatten(-1, (self.output.shape[1], -1))
        weight = local(module.weight).float().unflatten(1, (self.output.shape[1], -1))
        gram = torch.einsum("ohd,ohe->hde", weight, weight)
        squares = torch.einsum("thd,hde,the->th", parts, gram, parts).clamp_min(0)
        x = self.x.to(parts.device)  # where layers lie on several devices, it comes from the last
        size = x.flatten(0, -2).norm(dim=-1, keepdim=True).clamp_min(1e-30)
        self.output[self.number] += (squares.sqrt() / size).double().sum(0).cpu()

    def after(self, module: nn.Module, args: tuple, out: Any) -> None:
        """The hidden states that go out."""
        y = (out[0] if isinstance(out, tuple) else out).float()
        x = self.x.to(y.device)
        self.cosines[self.number] += cosine_similarity(x, y, dim=-1).double().sum().cpu()
        self.x = torch.empty(0)
