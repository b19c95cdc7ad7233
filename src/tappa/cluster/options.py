"""Options that `tappa analyze`, `eval` and `prune` share: who does the work."""

from typing import Annotated

import typer

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
