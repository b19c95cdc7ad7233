"""analyze(): a model and texts in, an Analysis of every head out."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, reduce
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tappa.adapters import unwrapped
from tappa.arguments import check_callable, path_of, require_tokenizer, whole_number
from tappa.capture import LayerView, prefill
from tappa.checkpoint import first_line
from tappa.columns import in_order
from tappa.errors import AnalysisFileError, TappaError, TextError
from tappa.figures import head_figures
from tappa.files import write_atomic
from tappa.head_counts import kv_heads, one_or_all, query_heads
from tappa.layer_statistics import LayerStatistics, PromptReading, Settings
from tappa.models import context_length
from tappa.patterns import agreement, name_patterns
from tappa.tensor_parallel import HeadShards
from tappa.texts import as_texts, encode_texts
from tappa.wording import counted, described

SCHEMA = "tappa.analysis/1"
SHARDS = 256  # groups of prompts at most, however many there are
MODEL_KEYS = {"name", "class", "layers", "heads", "kv_heads", "dtype"}
Progress = Callable[[int, int], None]
Ids = TypeVar("Ids", list[int], np.ndarray)  # of a prompt


@dataclass(frozen=True)
class Analysis:
    """What is known of every head of a model on some texts (format: docs/analysis-file.md).

    All figures follow from `layers`, sums that add up: `a.merge(b)` is the analysis of both texts.
    """

    model: dict[str, Any]
    prompts: list[int]  # tokens of each prompt
    layers: list[LayerStatistics]
    settings: Settings = field(default_factory=Settings)

    def __repr__(self) -> str:
        count, heads = int(self.model["layers"]), self.model["heads"]
        total = sum(heads) if isinstance(heads, list) else count * heads
        size = f"{counted(count, 'layer')}, {counted(total, 'head')}"
        read = f"{counted(sum(self.prompts), 'token')} in {counted(len(self.prompts), 'prompt')}"
        return f"<Analysis of {self.model['name']}: {size}; {read}>"

    @cached_property
    def heads(self) -> list[dict[str, Any]]:
        """The figures of every head, labels included, by layer and head."""
        figures = [f for layer in self.layers for f in head_figures(layer)]
        return [f | name_patterns(f) for f in figures]

    def to_frame(self) -> pd.DataFrame:
        """One row for every head; the scores of the labels are columns of their own.

        Columns come in the order of tappa.columns: identity, the ten that matter, the others.
        """
        frame = pd.json_normalize(self.heads, sep="_")
        return frame[in_order(frame.columns)]

    def summary(self) -> dict[str, Any]:
        """Everything but the sums, ready for JSON."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "settings": asdict(self.settings),
            "prompts": self.prompts,
            "tokens": sum(self.prompts),
            "bounds_checked": sum(h["bounds_checked"] for h in self.heads),
            "bound_violations": sum(h["bound_violations"] for h in self.heads),
            "agreement": agreement(pd.DataFrame(self.heads)),
            "heads": self.heads,
        }

    def merge(self, other: "Analysis") -> "Analysis":
        """The analysis of both sets of texts, as if made in one go.

        Raises:
            AnalysisFileError: of different models or with different settings.
        """
        if not isinstance(other, Analysis):
            raise AnalysisFileError(f"expected an Analysis to merge with, got {described(other)}")
        for name in ("model", "settings"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise AnalysisFileError(f"cannot merge: {name} differs, {mine} and {theirs}")
        if len(self.layers) != len(other.layers):
            raise AnalysisFileError(
                f"cannot merge: {len(self.layers)} layers here and {len(other.layers)} there"
            )
        layers = [a + b for a, b in zip(self.layers, other.layers, strict=True)]
        return replace(self, prompts=self.prompts + other.prompts, layers=layers)

    def save(self, path: str | Path) -> Path:
        """Write one JSON file, atomically. Raises OutputError where that is not possible."""
        statistics = [
            asdict(layer) | {"sums": {name: x.tolist() for name, x in layer.sums.items()}}
            for layer in self.layers
        ]
        content = self.summary() | {"statistics": statistics}
        return write_atomic(path, json.dumps(content, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Analysis":
        """Read a file written by `save`.

        Raises:
            AnalysisFileError: missing, not JSON, another schema, or incomplete.
        """
        path = path_of(path, AnalysisFileError)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise AnalysisFileError(f"cannot read the Analysis {path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise AnalysisFileError(f"expected an Analysis in JSON, {path}: {error}") from error
        schema = content.get("schema") if isinstance(content, dict) else None
        if schema != SCHEMA:
            raise AnalysisFileError(f"expected schema {SCHEMA!r}, {path} has {schema!r}")
        try:
            layers = [_read_layer(layer) for layer in content["statistics"]]
            settings = Settings(**content["settings"])
            analysis = cls(content["model"], content["prompts"], layers, settings)
            _ = json.dumps(analysis.summary(), allow_nan=False)
        except Exception as error:  # whatever a damaged file leads to
            kind, reason = type(error).__name__, first_line(error)
            raise AnalysisFileError(f"incomplete Analysis {path}: {kind} {reason}") from error
        found, wanted = len(analysis.heads), len(content.get("heads", ()))
        if (
            not found
            or found != wanted
            or not analysis.prompts
            or not set(analysis.model) >= MODEL_KEYS
        ):
            raise AnalysisFileError(
                f"incomplete Analysis {path}: expected prompts, a model and the sums of {wanted} "
                f"heads, got those of {found}"
            )
        return analysis


def _read_layer(content: dict[str, Any]) -> LayerStatistics:
    sums = {name: np.array(values) for name, values in content["sums"].items()}
    # lists do not tell the shape of an array without numbers: no channel is rotated
    sums["align"] = sums["align"].reshape(len(sums["energy"]), len(content["theta"]), 2)
    return LayerStatistics(content["layer"], content["theta"], content["scale"], sums)


def analyze(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: str | Path | Sequence[str | Path],
    *,
    tokens: int | None = None,
    settings: Settings | None = None,
    chunk: int | None = None,
    progress: Progress | None = None,
) -> Analysis:
    """Analyse every attention head of a RoPE language model on some texts.

    Each text is one prompt of its first `tokens` tokens (default 2048, or the model's context). A
    `Path` stands for the text of that file.
    With `chunk`, prompts are prefilled in pieces of that many tokens, for prompts whose
    activations do not fit in memory. `progress(done, total)` is called after every layer.

        analysis = tappa.analyze(model, tokenizer, [text])
        analysis.to_frame().sort_values("q_similarity")

    Raises:
        TextError, ModelError, CaptureError, NonFiniteError: one line that says what is wrong.
    """
    model = unwrapped(model)
    require_tokenizer(tokenizer)
    check_callable("progress", progress)
    if settings is not None and not isinstance(settings, Settings):
        raise TappaError(f"expected settings as tappa.Settings, got {described(settings)}")
    prompts = encode_texts(tokenizer, as_texts(texts), tokens, context_length(model))
    steps = forward_passes(prompts, chunk) * int(model.config.get_text_config().num_hidden_layers)
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, steps)

    wanted = settings or Settings()
    parts = (analyze_prompts(model, s, wanted, chunk, step) for s in shards_of(prompts))
    return reduce(Analysis.merge, parts)


def shards_of(prompts: Sequence[Ids]) -> list[Sequence[Ids]]:
    """Prompts in at most SHARDS groups: what is merged, and what a worker of a cluster does.

    They follow from the prompts alone, so that sums do not depend on who added them up.
    """
    size = -(-len(prompts) // SHARDS)
    return [prompts[start : start + size] for start in range(0, len(prompts), size)]


def forward_passes(prompts: Sequence[Ids], chunk: int | None) -> int:
    """How often a model runs to read them. Raises TextError for a chunk that cannot be."""
    if chunk is not None:
        whole_number("chunk", chunk, 1, TextError)
    return sum(-(-len(ids) // chunk) if chunk else 1 for ids in prompts)


def analyze_prompts(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    settings: Settings,
    chunk: int | None = None,
    step: Callable[[], None] = lambda: None,
) -> Analysis:
    """The analysis of one shard; `step` is called after every layer."""
    shards, described = HeadShards.of(model), describe(model)
    merged: Analysis | None = None
    for ids in prompts:
        reading = PromptReading(settings, len(ids))

        def consume(view: LayerView, reading: PromptReading = reading) -> None:
            reading.add(view)
            step()

        prefill(model, torch.tensor([ids]), consume, chunk=chunk, logits_to_keep=1)
        statistics = [one.of_all_ranks(shards, described["heads"]) for one in reading.statistics()]
        prompt = Analysis(described, [len(ids)], statistics, settings)
        merged = prompt if merged is None else merged.merge(prompt)
    assert merged is not None  # encode_texts refuses to return nothing
    return merged


def describe(model: PreTrainedModel) -> dict[str, Any]:
    """What identifies a model in an Analysis.

    `heads` and `kv_heads` are lists where layers differ.
    """
    return {
        "name": str(model.config._name_or_path) or type(model).__name__,
        "class": type(model).__name__,
        "layers": model.config.get_text_config().num_hidden_layers,
        "heads": one_or_all(query_heads(model)),
        "kv_heads": one_or_all(kv_heads(model)),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
