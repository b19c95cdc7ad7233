"""What several commands share: options, lists of arguments, extras, a bar."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tappa.errors import MissingExtraError, ModelError
from tappa.tensor_parallel import rank_of_torchrun
from tappa.texts import read_text

ModelArgument = Annotated[
    str | None,
    typer.Argument(help="Hub id, folder or .gguf file; the packaged SmolLM2-135M if left out."),
]


def _device(value: str) -> str:
    """In processes of torchrun, which hold one model together, "tp". Raises ModelError."""
    if rank_of_torchrun() is None:
        return value
    if value not in ("auto", "tp"):
        raise ModelError(f"expected the device auto or tp under torchrun, got {value!r}")
    return "tp"


DeviceOption = Annotated[
    str,
    typer.Option(help="auto, cpu, cuda, cuda:1, all (GPUs) or tp (torchrun).", callback=_device),
]
DtypeOption = Annotated[str, typer.Option(help="auto, float32, float64, bfloat16 or float16.")]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]

# who does the work of `analyze`, `eval` and `prune`
WorkersOption = Annotated[
    int,
    typer.Option("--workers", min=1, help="Processes that share the work, each with the model."),
]
RayAddressOption = Annotated[
    str | None,
    typer.Option("--ray-address", help="Ray cluster: auto or HOST:PORT. Default: this machine."),
]
GpusOption = Annotated[
    float | None,
    typer.Option(
        "--gpus-per-worker",
        min=0,
        help="GPUs of a worker; layers are spread over several. Default: 1 if there are any.",
    ),
]
CpusOption = Annotated[
    int, typer.Option("--cpus-per-worker", min=1, help="Threads of each of several workers.")
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Print what there is to do and its cost; do nothing.")
]


def parts(text: str) -> list[str]:
    """`a, b` -> [a, b]."""
    return [part.strip() for part in text.split(",") if part.strip()]


def texts_of(paths: list[Path] | None, packaged: str) -> list[str]:
    """The texts in files; the packaged one where none is named. Raises TextError."""
    return [read_text(path) for path in paths] if paths else [packaged]


def extra(module: str, name: str) -> Any:
    """A module whose libraries are an extra of this name. Raises MissingExtraError."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if error.name is not None and error.name.split(".")[0] == "tappa":
            raise
        raise MissingExtraError(
            f"{error.name} is missing: this needs the extra, pip install 'tappa[{name}]'"
        ) from error


def is_first() -> bool:
    """Whether this process writes and prints: of those of torchrun only one does."""
    return rank_of_torchrun() in (None, 0)


def messages() -> Console:
    """stderr, for bars and notes."""
    return Console(stderr=True, quiet=not is_first())


def say(console: Console, text: str) -> None:
    """A line as it is."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def progress(console: Console, doing: str, what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, gone when it is done: (done, total)."""
    columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn(), TextColumn(what))
    off = not console.is_terminal  # else a stray empty line is printed
    left = TimeRemainingColumn()
    with Progress(*columns, left, console=console, transient=True, disable=off) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
