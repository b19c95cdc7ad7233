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
from tappa.report.views import Views


def write_report(
    path: str | Path,
    analyses: Sequence[str | Path],
    *,
    results: str | Path | None = None,
    views: Views | None = None,
) -> Path:
    """Write a report of Analysis files, and of what `tappa eval`, `prune` and `verify` left.

    Raises ReportError, OutputError, and MissingExtraError without the extra tappa[report].
    """
    return write_atomic(path, render(content_of(analyses, results, views)))


def render(content: dict[str, Any]) -> str:
    """The page. All that comes from models and texts is data, which scripts show as text only.

    The scripts are allowed by their hashes; nothing else may run, and nothing may be fetched.
    """
    try:
        from jinja2 import Environment, StrictUndefined

        plotly = resources.files("plotly") / "package_data" / "plotly.min.js"
    except ImportError as error:
        raise MissingExtraError("a report needs the extra, pip install 'tappa[report]'") from error
    page = resources.files("tappa.report") / "page"
    scripts = [plotly.read_text("utf-8"), (page / "report.js").read_text("utf-8")]
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    template = environment.from_string((page / "report.html").read_text("utf-8"))
    titles = [str(x["title"]) for x in content["analyses"]]
    return template.render(
        title=" and ".join(titles) or "no analysis",
        style=(page / "report.css").read_text("utf-8"),
        scripts=scripts,
        hashes=" ".join(f"'sha256-{_hash(script)}'" for script in scripts),
        data=_packed(content),
    )


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _packed(content: dict[str, Any]) -> str:
    """JSON, gzip, base64: no character of it means anything to HTML."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode("ascii")
