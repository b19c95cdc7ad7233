"""All commands under one name, and what becomes of their errors."""

import io
import os
import re
import sys
import warnings
from typing import Annotated, NoReturn

import typer

import tappa
from tappa.cli.analyze import analyze
from tappa.cli.common import is_first
from tappa.cli.eval import evaluate_methods, lm_eval
from tappa.cli.generate import generate, methods
from tappa.cli.prune import prune
from tappa.cli.report import draw_figures, report
from tappa.cli.verify import verify
from tappa.errors import TappaError
from tappa.tensor_parallel import leave_torchrun

INTERRUPTED = 130  # exit code

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)


def _version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"tappa {tappa.__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Why attention heads do what they do, by how self-similar their queries are over time."""


app.command()(analyze)
app.command()(report)
app.command("figures")(draw_figures)
app.command()(generate)
app.command("eval")(evaluate_methods)
app.command(
    "lm-eval",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)(lm_eval)
app.command()(prune)
app.command()(verify)
app.command()(methods)


def main() -> None:
    """Entry point: errors that a user can put right become one line and exit code 2."""
    for stream in (sys.stdout, sys.stderr):  # a terminal without Greek letters is no reason to fail
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    warnings.showwarning = _print_warning
    if not is_first():
        _silence()
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:  # what Typer makes of a KeyboardInterrupt
            raise KeyboardInterrupt
        sys.stdout.flush()
        leave_torchrun()
    except TappaError as error:
        _fail(_as_typed(str(error)), 2)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:  # the reader has gone: nobody is left to tell
        _silence()
        sys.exit(1)
    except OSError as error:
        _fail(f"cannot write the output: {error.strerror or error}", 2)
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        if not sys.argv[1:]:
            print(error.format_message())
            sys.exit(0)
        _fail(" ".join(error.format_message().split()), 2)  # an argument that Typer refuses
    sys.exit(code if isinstance(code, int) else 0)


def _as_typed(message: str) -> str:
    """An error of the library with options in the place of arguments: `force=True`, `--force`."""
    return re.sub(r"\b([a-z_]+)=True\b", lambda m: "--" + m[1].replace("_", "-"), message)


def _silence() -> None:
    """Whatever is printed from now on goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, code: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def _print_warning(message: Warning | str, *args: object, **kwargs: object) -> None:
    print(f"warning: {message}", file=sys.stderr)
