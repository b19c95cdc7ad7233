"""What a report shows of a text, as every head sees it: kept in views.npz beside an Analysis."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from tappa.errors import ReportError
from tappa.files import write_atomic

FILE = "views.npz"
SCHEMA = "tappa.views/2"
STRETCH = 1000.0  # of the logarithmic scale: weights below 1 / 1000 of the largest look like none
LEVELS = 63  # brightest level of a map: as many as an eye can tell apart, and small in a file
CURVES = ("vertical", "diagonal", "expected_vertical", "expected_diagonal")


@dataclass(frozen=True)
class Views:
    """One text as every head sees it. Heads are numbered layer by layer.

    `maps` (heads, size, size): mean attention in each cell of the T x T matrix, as one of LEVELS
    steps of a logarithmic scale (STRETCH). `keys`, `weights` (heads, tokens, top): the keys with
    most attention, and the attention in percent. `kept` (methods, budgets, KV heads, tokens): 1
    where a method keeps a token at a budget of so many tokens for each head. `persistence`
    (CURVES, heads, shifts): how much attention persists after a shift of (u, 0) and of (u, u)
    tokens, observed and expected by the query model, in 255ths.
    """

    title: str
    tokens: list[str]
    methods: list[str]
    budgets: list[int]
    shifts: list[int]
    maps: Shaped[np.ndarray, "heads size size"]
    keys: Shaped[np.ndarray, "heads tokens top"]
    weights: Shaped[np.ndarray, "heads tokens top"]
    kept: Shaped[np.ndarray, "methods budgets kv_heads tokens"]
    persistence: Shaped[np.ndarray, "curves heads shifts"]

    def check(self) -> None:
        """Whether the parts fit each other. Raises ReportError."""
        heads, size, width = self.maps.shape
        tokens = len(self.tokens)
        methods, budgets, _, kept_tokens = self.kept.shape
        fits = (
            size == width
            and self.keys.shape == self.weights.shape
            and self.keys.shape[:2] == (heads, tokens)
            and (methods, budgets, kept_tokens) == (len(self.methods), len(self.budgets), tokens)
            and self.persistence.shape == (len(CURVES), heads, len(self.shifts))
            and 0 <= int(self.keys.min(initial=0)) <= int(self.keys.max(initial=0)) < max(tokens, 1)
        )
        if not fits:
            raise ReportError("expected arrays that fit each other")

    def content(self) -> dict[str, Any]:
        """What the page gets of it: arrays as base64, row by row."""
        return {
            **{name: getattr(self, name) for name in LISTS},
            "title": self.title,
            "heads": len(self.maps),
            "size": int(self.maps.shape[1]),
            "top": int(self.keys.shape[2]),
            "kv_heads": int(self.kept.shape[2]),
            "stretch": STRETCH,
            "levels": LEVELS,
            "maps": _base64(self.maps.astype(np.uint8)),
            "keys": _base64(self.keys.astype("<u2")),
            "weights": _base64(self.weights.astype(np.uint8)),
            "kept": _base64(np.packbits(self.kept.astype(np.uint8), axis=-1)),
            "persistence": _base64(self.persistence.astype(np.uint8)),
        }


LISTS = ("tokens", "methods", "budgets", "shifts")
ARRAYS = ("maps", "keys", "weights", "kept", "persistence")


def save_views(path: str | Path, views: Sequence[Views]) -> Path:
    """Write the views of some texts as one .npz file, atomically. Raises OutputError."""
    arrays: dict[str, Any] = {"schema": SCHEMA, "count": len(views)}
    for number, view in enumerate(views):
        arrays |= {f"{number}.{name}": value for name, value in vars(view).items()}
    out = io.BytesIO()
    np.savez_compressed(out, **arrays)
    return write_atomic(path, out.getvalue())


def load_views(path: str | Path) -> list[Views]:
    """Read what `save_views` wrote; nothing is unpickled. Raises ReportError for anything else."""
    try:
        with np.load(path, allow_pickle=False) as file:
            schema = str(file["schema"]) if "schema" in file else "an older schema"
            if schema != SCHEMA:
                raise ReportError(f"expected {SCHEMA}, got {schema}")
            return [_read(file, number) for number in range(int(file["count"]))]
    except Exception as error:  # missing, another format, fields that are not there
        reason = str(error) if isinstance(error, ReportError) else type(error).__name__
        if isinstance(error, KeyError):
            reason += f", {error.args[0]}"  # which names the field
        raise ReportError(f"cannot read the views {path}: {reason}") from error


def _read(file: Any, number: int) -> Views:
    lists = {name: file[f"{number}.{name}"].tolist() for name in LISTS}
    arrays = {name: file[f"{number}.{name}"] for name in ARRAYS}
    found = Views(title=str(file[f"{number}.title"]), **lists, **arrays)
    found.check()
    return found


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")
