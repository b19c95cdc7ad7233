"""`tappa report` and `tappa figures`: what was found, as a page and as pictures."""

from pathlib import Path
from typing import Annotated

import typer

from tappa.files import check_writable_folder, made_folder, write_atomic
from tappa.report.choosing import ATLAS
from tappa.report.content import content_of
from tappa.report.page import render
from tappa.report.prints import figures

FEW_NOTES = 3  # on what files lack: more of them are counted only


def report(
    analyses: Annotated[
        list[Path], typer.Argument(help="analysis.json of 'tappa analyze --out'; several compare.")
    ],
    results: Annotated[
        Path | None, typer.Option(help="Folder in which eval, prune and verify left their files.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write.")] = Path(
        "report.html"
    ),
) -> None:
    """One page of all heads: atlas, head cards, text, results; opens without a network.

    Attention maps and texts come from views.npz beside each analysis. Needs the extra
    tappa[report].

    Examples:

    \b
      tappa analyze --out smollm2 && tappa report smollm2/analysis.json
      tappa report before/analysis.json after/analysis.json --results results -o both.html
    """
    check_writable_folder(out.absolute().parent)
    content = content_of(analyses, results)
    write_atomic(out, render(content))
    _warn(content["notes"])
    typer.echo(f"wrote {out}")


def _warn(notes: list[str]) -> None:
    """What is missing in files, on stderr: the notes themselves if they are few."""
    for note in notes if len(notes) <= FEW_NOTES else []:
        typer.echo(f"note: {note}", err=True)
    if len(notes) > FEW_NOTES:
        typer.echo(f"{len(notes)} notes on what is missing: see the top of the page", err=True)


def draw_figures(
    analysis: Annotated[Path, typer.Argument(help="analysis.json of 'tappa analyze --out'.")],
    results: Annotated[
        Path | None, typer.Option(help="Folder in which 'tappa eval' left its results.json.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the pictures.")] = Path(
        "figures"
    ),
    kind: Annotated[str, typer.Option("--format", help="png, svg or pdf.")] = "png",
    colour: Annotated[
        str | None,
        typer.Option("--colour", "--color", help=f"Column of heads.csv for the atlas [{ATLAS}]."),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            help="Heads of patterns and persistence, such as L18H8,L2H1. Default: the clearest "
            "head of every label."
        ),
    ] = None,
) -> None:
    """Draw figures for a paper: atlas, similarity, channels, patterns, quality against budget.

    Needs the extra tappa[figures]; patterns and persistence need views.npz beside the analysis.

    Examples:

    \b
      tappa figures smollm2/analysis.json -o figures
      tappa figures smollm2/analysis.json --results results --format pdf
      tappa figures smollm2/analysis.json --colour q_similarity
      tappa figures smollm2/analysis.json --colour observed --head L18H8,L2H1 --format svg
    """
    content = content_of([analysis], results, [] if colour is None else [colour])
    pictures = figures(content, kind, colour=colour or "", heads=head or "")
    with made_folder(out):
        for name, picture in pictures.items():
            typer.echo(f"wrote {write_atomic(out / name, picture)}")
    for note in content["notes"]:
        typer.echo(f"note: {note}", err=True)
