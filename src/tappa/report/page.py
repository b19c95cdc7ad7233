"""The report: one HTML file with everything in it, which opens from a disk without a network."""

import base64
import gzip
import hashlib
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from tappa.errors import MissingExtraError
from tappa.files import write_atomic
from tappa.report.content import content_of

LIMIT = 8_000_000  # bytes of a page; texts that do not fit into it are left out
SLACK = 4096  # of it, for what stands around the texts
# Parts of the page's script, in the order in which they run
PARTS = (
    *("base", "data", "meanings", "save", "folding", "atlas", "card", "text", "needle"),
    *("model", "compare", "results", "theory", "begin"),
)


def write_report(
    path: str | Path, analyses: Sequence[str | Path], results: str | Path | None = None
) -> Path:
    """Write a report of Analysis files, and of what `tappa eval`, `prune` and `verify` left.

    Attention maps and texts are those of views.npz beside each Analysis. Raises ReportError,
    OutputError, and MissingExtraError without the extra tappa[report].
    """
    return write_atomic(path, render(content_of(analyses, results)))


def render(content: dict[str, Any], limit: int = LIMIT) -> str:
    """The page, below `limit` bytes if leaving out texts can do it, but never the first.

    All that comes from models and texts is data, which scripts show as text only. The scripts are
    allowed by their hashes; nothing else may run, and nothing may be fetched. Plotly is compressed:
    the page's own script unpacks it into an element that its hash allows.
    """
    try:
        from jinja2 import Environment, StrictUndefined

        library = resources.files("plotly") / "package_data" / "plotly.min.js"
    except ImportError as error:
        raise MissingExtraError("a report needs the extra, pip install 'tappa[report]'") from error
    plotly = library.read_text("utf-8")
    page = resources.files("tappa.report") / "page"
    parts = [(page / "js" / f"{name}.js").read_text("utf-8") for name in PARTS]
    script = "\n".join(['"use strict";', "(async () => {", *parts, "})();"])
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    frame = (page / "report.html").read_text("utf-8")
    given = {
        "title": " and ".join(dict.fromkeys(x["title"] for x in content["analyses"]))
        or "no analysis",
        "style": (page / "report.css").read_text("utf-8"),
        "script": script,
        "hashes": " ".join(f"'sha256-{_hash(text)}'" for text in (script, plotly)),
        "plotly": _packed(plotly),
    }
    rest = {key: value for key, value in content.items() if key != "texts"}
    used = len(frame) + sum(map(len, given.values())) + len(_packed(json_of(rest)))
    texts, left_out = _fitting(content["texts"], limit - used - SLACK)
    listed = [{"analysis": text["analysis"], "title": text["title"]} for text, _ in texts]
    rest |= {"notes": content["notes"] + left_out, "texts": listed}
    given |= {"data": _packed(json_of(rest))}
    return environment.from_string(frame).render(given, texts=[packed for _, packed in texts])


def _fitting(
    texts: Sequence[dict[str, Any]], room: int
) -> tuple[list[tuple[dict[str, Any], str]], list[str]]:
    """The first texts that fit, each with its packed form, and notes on the others."""
    shown: list[tuple[dict[str, Any], str]] = []
    notes = []
    for text in texts:
        packed = _packed(json_of(text))
        room -= len(packed)
        if shown and room < 0:
            notes.append(f"{text['title']} is left out: the page would become too large")
        else:
            shown.append((text, packed))
    return shown, notes


def json_of(content: dict[str, Any]) -> str:
    """JSON without spaces; there must be no NaN."""
    return json.dumps(content, allow_nan=False, separators=(",", ":"))


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _packed(text: str) -> str:
    """gzip, base64: no character of it means anything to HTML."""
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode("ascii")
