"""`tappa analyze`."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from tappa import cluster
from tappa.analysis import Analysis
from tappa.cli.common import (
    CpusOption,
    DeviceOption,
    DryRunOption,
    DtypeOption,
    GpusOption,
    JsonOption,
    ModelArgument,
    RayAddressOption,
    TrustOption,
    WorkersOption,
    is_first,
    messages,
    texts_of,
)
from tappa.display import show
from tappa.errors import MissingExtraError, OutputError
from tappa.files import (
    check_writable_folder,
    difference,
    digest_of,
    made_folder,
    write_atomic,
)
from tappa.models import DEFAULT_NAME
from tappa.report.looking import TEXTS
from tappa.report.page import write_report
from tappa.report.views import FILE, Views, save_views
from tappa.texts import packaged_text

ASKED = "asked.json"  # in the output folder: of what its analysis is


def analyze(
    model: ModelArgument = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="UTF-8 text file, one prompt; may be repeated. Default: packaged prose."),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of each text. Default: 2048, or the model's context if less."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for analysis.json, heads.csv and report.html.")
    ] = None,
    report: Annotated[
        bool, typer.Option("--report/--no-report", help="Write report.html into the folder too.")
    ] = True,
    shown: Annotated[
        int, typer.Option("--shown-texts", min=1, help="Texts whose maps the report shows.")
    ] = TEXTS,
    as_json: JsonOption = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    chunk: Annotated[
        int | None, typer.Option(min=8, help="Prefill in pieces of this many tokens.")
    ] = None,
    workers: WorkersOption = 1,
    ray_address: RayAddressOption = None,
    gpus_per_worker: GpusOption = None,
    cpus_per_worker: CpusOption = 1,
    dry_run: DryRunOption = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace another analysis in the output folder.")
    ] = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Analyse every attention head of a RoPE language model.

    Examples:

    \b
      tappa analyze
      tappa analyze model.gguf --text notes.txt --tokens 4096 --out results
      tappa analyze model.gguf --text a.txt --text b.txt --workers 2 --out results
      tappa analyze ./my-model --json | jq '.agreement'
    """
    texts = texts_of(text, packaged_text())
    titles = [path.name for path in text] if text else ["Pride and Prejudice"]
    asked = _asked(model, titles, texts, tokens, dtype)
    if out is not None:
        check_writable_folder(out)
        if not (dry_run or force):
            _check_target(out, asked)
    errors = messages()
    source = cluster.ModelSource(model, device, dtype, trust_remote_code)
    placement = cluster.Placement(workers, ray_address, gpus_per_worker, cpus_per_worker)
    if dry_run:
        print(cluster.estimate_analysis(model, texts, tokens, placement))
        return
    with cluster.open_pool(source, placement, errors) as pool:
        with cluster.following(errors, "analysing", "steps") as follow:
            analysis = cluster.analyze_texts(
                *(pool, texts),
                tokens=tokens,
                chunk=chunk,
                folder=cluster.state_folder(out, placement),
                follow=follow,
            )
        written = [] if out is None else _save(analysis, out, asked)
        if out is not None and report:
            with errors.status("drawing the report"):
                chosen = list(zip(titles, texts, strict=True))[:shown]
                views = [cluster.look_at(pool, content, title, tokens) for title, content in chosen]
                written += _draw(views, out)
    if as_json:
        print(json.dumps(analysis.summary(), allow_nan=False))
        return
    show(analysis, Console())
    if written:
        typer.echo(f"\nwrote {', '.join(map(str, written))}")


def _asked(
    model: str | None, titles: list[str], texts: list[str], tokens: int | None, dtype: str
) -> dict[str, Any]:
    """What decides the figures."""
    return {
        "model": DEFAULT_NAME if model is None else str(Path(model)),
        "texts": [f"{one} ({digest_of(text)})" for one, text in zip(titles, texts, strict=True)],
        "tokens": tokens,
        "dtype": dtype,
    }


def _check_target(out: Path, asked: dict[str, Any]) -> None:
    """Raise OutputError for a folder with the analysis of another model or text."""
    if not (out / "analysis.json").exists():
        return
    try:
        known = json.loads((out / ASKED).read_text(encoding="utf-8"))
        other = difference(known, asked)
    except (OSError, ValueError, AttributeError):
        other = f"it has no {ASKED} that says of what"
    if other is not None:
        raise OutputError(
            f"{out} holds another analysis ({other}): choose another folder, or --force to "
            "replace it"
        )


def _save(analysis: Analysis, out: Path, asked: dict[str, Any]) -> list[Path]:
    """The files with the figures, and what they are of."""
    if not is_first():
        return []
    table = analysis.to_frame().to_csv(index=False)
    with made_folder(out):
        write_atomic(out / ASKED, json.dumps(asked, indent=1) + "\n")
        return [analysis.save(out / "analysis.json"), write_atomic(out / "heads.csv", table)]


def _draw(views: Sequence[Views], out: Path) -> list[Path]:
    """The files with the pictures: no page where its libraries are missing."""
    if not is_first():
        return []
    written = [save_views(out / FILE, views)]
    try:
        written.append(write_report(out / "report.html", [out / "analysis.json"]))
    except MissingExtraError as error:
        warnings.warn(str(error), stacklevel=1)
    return written
