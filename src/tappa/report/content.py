"""From files of analyses and results to what a report page holds, with notes on what is missing."""

import base64
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tappa.analysis import SCHEMA
from tappa.errors import ReportError
from tappa.files import finite
from tappa.patterns import LABELS, explain
from tappa.report.views import STRETCH, Views

LAGS = 160  # distances of a lag profile that are shown
DIGITS = 4  # significant, of every number
FIGURES = {
    "q_similarity": "q-similarity S (before RoPE)",
    "q_similarity_post_all_prompt": "q-similarity after RoPE",
    "k_similarity": "k-similarity",
    "predictability": "predictability",
    "vertical": "persistence, shift (1, 0)",
    "diagonal": "persistence, shift (1, 1)",
    "seasonal": "persistence, shift (L, L)",
    "sink_mass": "attention on the first tokens",
    "heavy_mass": "attention on the 8 heaviest keys",
    "entropy": "entropy of a row (0 to 1)",
    "dominant_channel": "dominant channel",
    "dominant_share": "its share of energy",
    "frequency": "its frequency (radians per token)",
    "period": "its period (tokens)",
    "angle": "its angle (radians)",
    "alignment": "its alignment",
    "unrotated_share": "energy without RoPE",
    "season": "season L (tokens)",
    "measured_period": "period of the lag profile (tokens)",
    "period_strength": "strength of that period",
    "expected_predictability": "expected predictability",
    "expected_vertical": "expected persistence (1, 0)",
    "expected_diagonal": "expected persistence (1, 1)",
    "bound_violations": "bound violations",
}
TIGHTNESS = ("vertical", "sequential", "seasonal", "seasonal_rows", "seasonal_columns", "residual")
RESULTS = ("results.json", "pruning.json", "verification.json")


def content_of(
    analyses: Sequence[str | Path],
    results: str | Path | None = None,
    views: Views | None = None,
) -> dict[str, Any]:
    """What the page shows, ready for JSON. Views belong to the first analysis.

    Files are read leniently: what is missing in one is a note on the page. Raises ReportError for a
    file that is no Analysis at all, and for a folder of results that does not exist.
    """
    notes: list[str] = []
    shown = [analysis_content(Path(path), notes) for path in analyses]
    found = results_content(Path(results), notes) if results is not None else {}
    if views is None:
        notes.append("no attention maps and no text: tappa analyze --out keeps them (views.npz)")
    elif not views.methods:
        notes.append("no tokens that methods keep: too short a text, or a cache of another kind")
    content = {
        "labels": list(LABELS),
        "figures": FIGURES,
        "tightness": list(TIGHTNESS),
        "analyses": shown,
        "views": None if views is None else views_content(views),
        "results": found,
        "notes": notes,
    }
    return dict(finite(rounded(content)))


def analysis_content(path: Path, notes: list[str]) -> dict[str, Any]:
    """One analysis: figures of heads, lag profiles, energies of channels."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "not JSON"
        raise ReportError(f"cannot read the Analysis {path}: {reason}") from error
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if not isinstance(schema, str) or not schema.startswith("tappa.analysis/"):
        raise ReportError(f"expected an Analysis of tappa, {path} has schema {schema!r}")
    if schema != SCHEMA:
        notes.append(f"{path.name} has schema {schema}: some figures may be missing")
    heads = [_head(head) for head in raw.get("heads") or [] if isinstance(head, dict)]
    if not heads:
        notes.append(f"{path.name} has no heads")
    missing = [name for name in FIGURES if heads and all(h[name] is None for h in heads)]
    wanted = [name for name in missing if heads and name not in (raw["heads"][0] or {})]
    if wanted:
        notes.append(f"{path.name} lacks {', '.join(wanted)}")
    model = raw.get("model") if isinstance(raw.get("model"), dict) else {}
    content = {
        "title": str(model.get("name", path.stem)),
        "file": path.name,
        "model": model,
        "prompts": raw.get("prompts") or [],
        "bounds_checked": raw.get("bounds_checked"),
        "bound_violations": raw.get("bound_violations"),
        "agreement": raw.get("agreement") or {},
        "heads": heads,
    }
    try:
        profiles = _profiles(raw["statistics"])
        if len(profiles["attention"]) != len(heads):
            raise ReportError("other heads")
    except Exception:  # statistics of another schema, or none
        profiles = {}
        notes.append(f"{path.name} has no lag profiles and no energies of channels")
    return content | profiles


def _head(raw: dict[str, Any]) -> dict[str, Any]:
    head = {name: raw.get(name) for name in ("layer", "head", "kv_head", "observed", "explained")}
    head |= {name: raw.get(name) for name in FIGURES}
    head["tightness"] = [raw.get(f"tightness_{name}") for name in TIGHTNESS]
    try:
        head["sentence"] = explain(raw)
    except Exception:  # figures that an older file does not have
        head["sentence"] = ""
    return head


def _profiles(statistics: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean attention and logit at every lag, energy shares of channels, theta; of all heads."""
    found: dict[str, Any] = {"attention": [], "logits": [], "energy": [], "theta": []}
    for layer in statistics:
        sums = layer["sums"]
        counts = np.array(sums["lag_counts"], float)[:LAGS]
        seen = counts > 0
        for name in ("attention", "logits"):
            sums_at = np.array(sums[f"lag_{name}"], float)[:, :LAGS]
            found[name] += (sums_at[:, seen] / counts[seen]).tolist()
        energy = np.array(sums["energy"], float)
        total = energy.sum(1, keepdims=True)
        found["energy"] += np.divide(energy, total, where=total > 0, out=energy * 0).tolist()
        found["theta"].append(layer["theta"])
    return found


def results_content(folder: Path, notes: list[str]) -> dict[str, list[Any]]:
    """Every results.json, pruning.json and verification.json below a folder."""
    if not folder.is_dir():
        raise ReportError(f"expected a folder of results, got {folder}, which is none")
    found: dict[str, list[Any]] = {name: [] for name in RESULTS}
    for path in sorted(folder.rglob("*.json")):
        if path.name not in RESULTS:
            continue
        name = str(path.parent.relative_to(folder.parent))
        try:
            found[path.name].append({"name": name, "content": json.loads(path.read_text("utf-8"))})
        except (OSError, ValueError, RecursionError):
            notes.append(f"{name}/{path.name} cannot be read")
    if not any(found.values()):
        notes.append(f"no {', '.join(RESULTS)} below {folder.name}")
    return found


def views_content(views: Views) -> dict[str, Any]:
    """Arrays as base64, row by row."""
    return {
        "tokens": views.tokens,
        "methods": views.methods,
        "budget": views.budget,
        "size": int(views.maps.shape[1]),
        "stretch": STRETCH,
        "top": int(views.keys.shape[2]),
        "maps": _base64(views.maps.astype(np.uint8)),
        "keys": _base64(views.keys.astype("<u2")),
        "weights": _base64(views.weights.astype(np.uint8)),
        "kept": _base64(np.packbits(views.kept.astype(np.uint8), axis=-1)),
        "kv_heads": int(views.kept.shape[1]),
    }


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")


def rounded(x: Any) -> Any:
    """The same with numbers of a few digits: a page is read, not computed with."""
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [rounded(value) for value in x]
    if isinstance(x, float) and math.isfinite(x):
        return float(f"{x:.{DIGITS}g}")
    return x
