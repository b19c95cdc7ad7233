"""prune(): which layers or heads go, and a model without them."""

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, get_args

import numpy as np
from transformers import PreTrainedModel

from tappa.analysis import Analysis, describe
from tappa.arguments import finite_number, require_model, whole_number
from tappa.errors import PruningError
from tappa.pruning.calibration import Calibration, Progress
from tappa.pruning.heads import Head, check_kv_groups, remove_kv_groups, silence_heads
from tappa.pruning.importance import HeadImportance, group_importance, head_importance
from tappa.pruning.layers import check_layers, layers_removed, remove_layers
from tappa.pruning.measure import nll_of_windows
from tappa.pruning.orders import (
    Known,
    Measure,
    check_count,
    check_order,
    layer_count,
    layers_to_remove,
)
from tappa.pruning.structure import kv_heads_of, query_heads_of
from tappa.pruning.windows import Windows
from tappa.tensor_parallel import require_whole
from tappa.wording import described, did_you_mean


@dataclass(frozen=True)
class Plan:
    """What is to be removed, and by which rule."""

    layers: list[int] = field(default_factory=list)  # in the order of removal
    query_heads: list[Head] = field(default_factory=list)  # silenced, as (layer, head)
    kv_groups: list[Head] = field(default_factory=list)  # sliced out, as (layer, KV head)
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Amounts:
    """How much to remove and how to choose. Heads are removed first, then layers."""

    layers: int | float = 0  # or a share of them, as 0.2
    query_heads: int = 0  # of the whole model
    kv_groups: int = 0  # of every layer
    order: str = "bi"
    beta: float = 0.3
    seed: int = 0
    importance: HeadImportance = "output"

    def check(self, model: PreTrainedModel) -> None:
        """Raises PruningError for what cannot be removed from this model, before any work."""
        check_order(self.order)
        layers, heads = describe(model)["layers"], query_heads_of(model)
        check_count(layer_count(self.layers, layers), layers)
        self._check_kinds()
        for what, count, most in (
            ("query heads of the model", self.query_heads, layers * heads),
            ("KV heads of each layer", self.kv_groups, kv_heads_of(model) if self.kv_groups else 1),
        ):
            if count >= most:
                rest = "at least one must stay"
                raise PruningError(f"cannot remove {count} of {most} {what}: {rest}")
        if self.kv_groups:  # which ones does not matter: every model that lacks as many is alike
            check_kv_groups(model, [(i, g) for i in range(layers) for g in range(self.kv_groups)])

    def _check_kinds(self) -> None:
        names = get_args(HeadImportance)
        if not isinstance(self.importance, str) or self.importance not in names:
            came, hint = described(self.importance), did_you_mean(str(self.importance), names)
            raise PruningError(f"expected the importance {', '.join(names)}, got {came}{hint}")
        for name in ("query_heads", "kv_groups", "seed"):
            whole_number(name, getattr(self, name), 0, PruningError)
        finite_number("beta", self.beta, PruningError)


def plan(
    model: PreTrainedModel,
    known: Calibration | Analysis,
    amounts: Amounts,
    windows: Windows | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Choose layers and heads; the model stays as it is.

    `windows` are what the order `greedy` measures perplexity on; `progress(done, total)` follows
    it. An Analysis knows q-similarity only. Raises PruningError.
    """
    require_model(model)
    if not isinstance(known, Calibration | Analysis):
        raise PruningError(
            f"expected a Calibration of tappa.calibrate, or an Analysis, got {described(known)}"
        )
    if windows is not None and not isinstance(windows, Windows):
        raise PruningError(f"expected windows as tappa.pruning.Windows, got {described(windows)}")
    amounts.check(model)
    count = layer_count(amounts.layers, describe(model)["layers"])
    amounts = replace(amounts, layers=count)
    calibration = _of_analysis(known, amounts) if isinstance(known, Analysis) else known
    theirs, ours = calibration.model, describe(model)
    for key in ("class", "layers", "heads", "kv_heads"):
        if theirs[key] != ours[key]:
            raise PruningError(
                f"the calibration is of another model: {key} is {theirs[key]} there and "
                f"{ours[key]} here"
            )
    if amounts.order == "greedy" and windows is None:
        raise PruningError("the order greedy needs windows of text to measure perplexity on")
    figures = Known(
        calibration.block_influence,
        calibration.layer_similarity,
        count,
        amounts.beta,
        amounts.seed,
        None if windows is None else _perplexity_without(model, windows, count, progress),
    )
    importance = head_importance(calibration, amounts.importance)
    return Plan(
        layers=layers_to_remove(amounts.order, figures),
        query_heads=_least(importance, amounts.query_heads),
        kv_groups=[
            (layer, int(group))
            for layer, row in enumerate(_group_importance(model, importance, amounts))
            for group in np.sort(np.argsort(row, kind="stable")[: amounts.kv_groups])
        ],
        settings=asdict(amounts),
    )


def prune(
    model: PreTrainedModel,
    known: Calibration | Analysis,
    *,
    windows: Windows | None = None,
    **amounts: Any,
) -> PreTrainedModel:
    """Remove layers and heads from a model, in place, and return it.

        calibration = tappa.calibrate(model, tokenizer, text)
        tappa.prune(model, calibration, layers=0.2)  # a fifth of them, or as many: layers=9
        model.save_pretrained("smaller")

    `amounts` are the fields of `Amounts`: `layers`, `query_heads` (of the whole model, silenced),
    `kv_groups` (of every layer, sliced out), `order`, `beta`, `seed`, `importance`. An Analysis
    will do for what needs q-similarity only. What is left can be trained: a model that
    is frozen as a whole, as `tappa.load` gives it, is no longer; parameters of another are as
    trainable as before. Raises PruningError, and nothing is altered then.
    """
    names = [one.name for one in fields(Amounts)]
    if unknown := [name for name in amounts if name not in names]:
        hint = did_you_mean(unknown[0], names)
        raise PruningError(f"expected amounts of {', '.join(names)}, got {unknown[0]!r}{hint}")
    smaller = apply(model, plan(model, known, Amounts(**amounts), windows))
    if not any(parameter.requires_grad for parameter in smaller.parameters()):
        smaller.requires_grad_(True)
    return smaller


def apply(model: PreTrainedModel, wanted: Plan) -> PreTrainedModel:
    """Remove what a plan says, in place. Raises ModelError for a model that is split.

    Raises PruningError for what would not run, before anything is altered.
    """
    require_whole(model, "remove layers or heads")
    if wanted.kv_groups:
        check_kv_groups(model, wanted.kv_groups)
    check_layers(model, wanted.layers)
    silence_heads(model, wanted.query_heads)
    remove_kv_groups(model, wanted.kv_groups)
    return remove_layers(model, wanted.layers) if wanted.layers else model


def _group_importance(
    model: PreTrainedModel, importance: np.ndarray, amounts: Amounts
) -> np.ndarray:
    """Of the KV heads of every layer, of which there is none where none is to be removed."""
    if not amounts.kv_groups:
        return importance[:, :0]
    return group_importance(importance, kv_heads_of(model))


def _least(importance: np.ndarray, count: int) -> list[Head]:
    """The least important heads of the whole model, ties by lower layer and head."""
    places = np.argsort(importance.ravel(), kind="stable")[:count]
    return [(int(p) // importance.shape[1], int(p) % importance.shape[1]) for p in places]


def _of_analysis(analysis: Analysis, amounts: Amounts) -> Calibration:
    """What an Analysis knows: q-similarity of every head, before RoPE, all pairs of a prompt."""
    heads = amounts.query_heads or amounts.kv_groups
    if amounts.layers and amounts.order not in ("q_similarity", "uniform", "random", "greedy"):
        raise PruningError(
            f"an Analysis knows no block influence, which the order {amounts.order} needs: use "
            "tappa.calibrate, or the order q_similarity"
        )
    if heads and amounts.importance != "dissimilarity":
        raise PruningError(
            f"an Analysis knows no outputs of heads, which the importance {amounts.importance} "
            "needs: use tappa.calibrate, or the importance dissimilarity"
        )
    frame = analysis.to_frame().sort_values(["layer", "head"])
    shape = analysis.model["layers"], analysis.model["heads"]
    if len(frame) != shape[0] * shape[1]:
        raise PruningError(
            f"expected an Analysis of {shape[0]} x {shape[1]} heads, got {len(frame)}"
        )
    similarity = frame["q_similarity"].to_numpy(float).reshape(shape)
    unknown = np.zeros(shape)  # nothing that is asked for here looks at it
    return Calibration(analysis.model, {}, 1, 1, unknown[:, 0], similarity, unknown)


def _perplexity_without(
    model: PreTrainedModel, windows: Windows, count: int, progress: Progress | None
) -> Measure:
    layers, done = describe(model)["layers"], 0
    total = sum(layers - step for step in range(count))

    def measure(gone: Any) -> float:
        nonlocal done
        if progress is not None:
            progress(done, total)
        done += 1
        with layers_removed(model, gone):
            nll = nll_of_windows(model, windows)
        return sum(nll) / len(nll)

    return measure
