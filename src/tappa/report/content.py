"""From files of analyses and results to what a report page holds, with notes on what is missing."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tappa.analysis import SCHEMA
from tappa.columns import COLUMNS, TERMS, value_of
from tappa.errors import ReportError
from tappa.files import finite
from tappa.patterns import LABELS, explain
from tappa.report.choosing import atlas_colour, known_column
from tappa.report.views import CURVES, FILE, load_views
from tappa.verification.bounds import NAMES

LAGS = 160  # distances of a lag profile that are shown
DIGITS = 4  # significant, of every number
FIGURES = {column.name: column.words for column in COLUMNS.values() if column.words}
TIGHTNESS = ("vertical", "sequential", "seasonal", "seasonal_rows", "seasonal_columns", "residual")
RESULTS = {  # files, and parts of which each has one at least
    "results.json": ("tables",),
    "pruning.json": ("plan", "layers", "before", "after"),
    "verification.json": (
        *("bounds", "relocations", "constructed", "observations"),
        *("resonances", "sensitivity", "needs"),
    ),
    "generation.json": ("method", "new_tokens", "nbytes"),
}
MOST = 1024  # layers, and heads of a layer, of a file that does not tell how many its model has


@dataclass(frozen=True)
class Notes:
    """What the page says on top: of files that are damaged, and of what others lack."""

    damage: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def content_of(
    analyses: Sequence[str | Path],
    results: str | Path | None = None,
    columns: Sequence[str] = (),
) -> dict[str, Any]:
    """What the page shows, ready for JSON; `texts` of views.npz beside each analysis, first ones
    first; of heads the columns that the page shows, and those in `columns`.

    Files are read leniently: what is missing in one is a note on the page. Raises ReportError for a
    file that is no Analysis at all, for a folder of results that does not exist, and for a column
    that heads.csv does not have.
    """
    columns = [known_column(name) for name in columns]
    notes = Notes()
    paths = [Path(path) for path in analyses]
    shown = [analysis_content(path, notes, columns) for path in paths]
    found = results_content(Path(results), notes) if results is not None else {}
    for analysis, origin in zip(shown, origins(shown, found), strict=True):
        analysis["origin"] = origin
    texts = texts_content(paths, shown, notes)
    content = {
        "labels": list(LABELS),
        "figures": FIGURES,
        "meanings": {name: column.meaning for name, column in COLUMNS.items()},
        "terms": {words: name for name, words in FIGURES.items()} | TERMS,
        "tightness": list(TIGHTNESS),
        "bounds": NAMES,
        "curves": list(CURVES),
        "analyses": shown,
        "results": found,
        "notes": notes.damage + notes.missing,
        "damaged": len(notes.damage),
    }
    return dict(finite(rounded(content))) | {"texts": texts}


def analysis_content(path: Path, notes: Notes, columns: Sequence[str] = ()) -> dict[str, Any]:
    """One analysis: figures of heads, lag profiles, energies of channels."""
    raw = _read(path)
    if raw["schema"] != SCHEMA:
        notes.missing.append(f"{path.name} has schema {raw['schema']}: some figures may be missing")
    model: dict[str, Any] = raw["model"] if isinstance(raw.get("model"), dict) else {}
    given = _list(raw.get("heads"))
    placed = [head for head in given if isinstance(head, dict) and _has_place(head, model)]
    heads = [_head(head, columns) for head in placed]
    if not heads:
        notes.damage.append(f"{path.name} has no heads")
    elif len(heads) < len(given):
        notes.damage.append(
            f"{path.name}: {len(given) - len(heads)} heads without layer and number, or beyond "
            "those that the model has"
        )
    wanted = [name for name in FIGURES if heads and all(name not in head for head in placed)]
    if wanted:
        notes.missing.append(f"{path.name} lacks {', '.join(wanted)}")
    content = {
        "title": _model_name(model.get("name", path.stem)),
        "file": f"{path.absolute().parent.name}/{path.name}",
        "model": model,
        "prompts": [x for x in _list(raw.get("prompts")) if isinstance(x, int)],
        "bounds_checked": raw.get("bounds_checked"),
        "bound_violations": raw.get("bound_violations"),
        "agreement": raw.get("agreement") if isinstance(raw.get("agreement"), dict) else {},
        "heads": heads,
        "colour": atlas_colour(heads),
    }
    try:
        profiles = _profiles(raw["statistics"])
        if len(profiles["attention"]) != len(heads):
            raise ReportError("other heads")
    except Exception:  # statistics of another schema, or none
        profiles = {}
        notes.missing.append(f"{path.name} has no lag profiles and no energies of channels")
    return content | profiles


def _read(path: Path) -> dict[str, Any]:
    """An Analysis of this schema or an older one."""
    if path.is_dir():
        raise ReportError(f"expected a file, {path} is a folder: try {path / 'analysis.json'}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "not JSON"
        raise ReportError(f"cannot read the Analysis {path}: {reason}") from error
    schema = raw.get("schema") if isinstance(raw, dict) else None
    kind, _, version = SCHEMA.partition("/")
    if not isinstance(schema, str) or not schema.startswith(f"{kind}/"):
        raise ReportError(f"expected an Analysis of tappa, {path} has schema {schema!r}")
    if schema not in [f"{kind}/{older}" for older in range(int(version) + 1)]:
        raise ReportError(f"expected schema {SCHEMA} or an older one, {path} has {schema!r}")
    return dict(raw)


def _model_name(name: Any) -> str:
    """Of what lies on a disk the name alone: paths tell of people."""
    return Path(str(name)).name if Path(str(name)).is_absolute() else str(name)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _has_place(head: dict[str, Any], model: dict[str, Any]) -> bool:
    """Whether the model has such a layer and head: the page draws a cell for every one below."""
    limits = {"layer": model.get("layers"), "head": model.get("heads")}
    return all(
        isinstance(head.get(key), int)
        and 0 <= head[key] < min(MOST, limit if isinstance(limit, int) else MOST)
        for key, limit in limits.items()
    )


def _head(raw: dict[str, Any], columns: Sequence[str]) -> dict[str, Any]:
    head = {name: raw.get(name) for name in ("layer", "head", "kv_head", "observed", "explained")}
    head["measured_channel"] = raw.get("measured_channel")
    head |= {name: value_of(raw, name) for name in (*FIGURES, *columns)}
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


def texts_content(
    paths: Sequence[Path], shown: Sequence[dict[str, Any]], notes: Notes
) -> list[dict[str, Any]]:
    """The texts of views.npz beside every analysis: first ones of all, then second ones."""
    found = []
    for place, (path, analysis) in enumerate(zip(paths, shown, strict=True)):
        file = path.with_name(FILE)
        if not file.is_file():
            notes.missing.append(
                f"{path.name}: no attention maps and no text, which tappa analyze keeps ({FILE})"
            )
            continue
        try:
            views = load_views(file)
        except ReportError as error:
            short = str(error).replace(str(file), f"{file.absolute().parent.name}/{FILE}")
            notes.damage.append(f"{short}: run tappa analyze again")
            continue
        for number, view in enumerate(views):
            if len(view.maps) != len(analysis["heads"]):
                notes.damage.append(f"{path.name}: {FILE} has {len(view.maps)} heads, not shown")
                break
            if not view.methods:
                notes.missing.append(
                    f"{view.title}: no tokens that methods keep: too short a text, or a cache of "
                    "another kind"
                )
            found.append((number, {"analysis": place} | view.content()))
    return [content for _, content in sorted(found, key=lambda pair: pair[0])]


def origins(
    analyses: Sequence[dict[str, Any]], results: dict[str, list[Any]]
) -> list[list[int] | None]:
    """Which layer of the first analysis each layer of the others was, before layers were removed.

    From the pruning.json whose numbers of layers fit; None where layers cannot be matched.
    """
    layers = [_layers(analysis) for analysis in analyses]
    found: list[list[int] | None] = []
    for count in layers:
        kept = [
            sorted(set(range(layers[0])) - removed)
            for removed in map(_removed, results.get("pruning.json", []))
        ]
        fits = [x for x in [list(range(layers[0])), *kept] if len(x) == count]
        found.append(fits[0] if fits else None)
    return found


def _layers(analysis: dict[str, Any]) -> int:
    return max((head["layer"] for head in analysis["heads"]), default=-1) + 1


def _removed(result: dict[str, Any]) -> set[int]:
    plan = result["content"].get("plan")
    layers = _list(plan.get("layers")) if isinstance(plan, dict) else []
    return {layer for layer in layers if isinstance(layer, int)}


def results_content(folder: Path, notes: Notes) -> dict[str, list[Any]]:
    """Every file of RESULTS below a folder: a list for each name."""
    if not folder.is_dir():
        raise ReportError(f"expected a folder of results, got {folder}, which is none")
    found: dict[str, list[Any]] = {name: [] for name in RESULTS}
    for path in sorted(folder.rglob("*.json")):
        if path.name not in RESULTS:
            continue
        name = str(path.parent.relative_to(folder.parent))
        try:
            content = json.loads(path.read_text("utf-8"))
            if not isinstance(content, dict):
                raise ValueError("expected an object")
            if not any(part in content for part in RESULTS[path.name]):
                raise ValueError("expected a file of tappa")
            found[path.name].append({"name": name, "content": content})
        except (OSError, ValueError, RecursionError):
            notes.damage.append(f"{name}/{path.name} cannot be read")
    if not any(found.values()):
        notes.missing.append(f"no {', '.join(RESULTS)} below {folder.name}")
    return found


def rounded(x: Any) -> Any:
    """The same with numbers of a few digits: a page is read, not computed with."""
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [rounded(value) for value in x]
    if isinstance(x, float) and math.isfinite(x):
        return float(f"{x:.{DIGITS}g}")
    return x
