"""`tappa prune`."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from tappa import cluster, pruning
from tappa.cli.common import (
    CpusOption,
    DeviceOption,
    DtypeOption,
    GpusOption,
    JsonOption,
    ModelArgument,
    RayAddressOption,
    TrustOption,
    WorkersOption,
    messages,
    progress,
    say,
    texts_of,
)
from tappa.display import render_plan
from tappa.errors import PruningError
from tappa.files import write_atomic
from tappa.tensor_parallel import require_whole
from tappa.texts import packaged_halves


def prune(
    model: ModelArgument = None,
    layers: Annotated[
        str, typer.Option(help="Layers to remove: a number, or a share such as 20%.")
    ] = "0",
    order: Annotated[
        str,
        typer.Option(help="bi, bi_prime, q_similarity, uniform, random, reverse or greedy."),
    ] = "bi",
    beta: Annotated[float, typer.Option(help="Weight of 1 - q-similarity in bi_prime.")] = 0.3,
    query_heads: Annotated[
        int, typer.Option(help="Query heads of the whole model to silence: no smaller, no faster.")
    ] = 0,
    kv_groups: Annotated[
        int, typer.Option(help="KV heads of every layer to slice out, with their query heads.")
    ] = 0,
    importance: Annotated[
        str, typer.Option(help="Of heads: output (norm), dissimilarity (1 - S), or mix.")
    ] = "output",
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Calibration text; may be repeated. Default: half of the packaged one."),
    ] = None,
    held_out: Annotated[
        Path | None,
        typer.Option(help="Text for perplexity. Default: the other half of the packaged one."),
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens of a window.")] = 1024,
    stride: Annotated[int, typer.Option(help="Tokens from one window's start to the next.")] = 256,
    windows: Annotated[
        int,
        typer.Option(
            min=1, help="At most so many windows of each text, evenly spread: fewer are faster."
        ),
    ] = 32,
    calibration: Annotated[
        Path | None,
        typer.Option(help="File of the calibration: written, resumed, and used if complete."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the order random.")] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the checkpoint.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Picture of BI, q-similarity and BI' (.png, .svg, .pdf).")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print cost, order and scores; remove nothing.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the checkpoint in the output folder.")
    ] = False,
    workers: WorkersOption = 1,
    ray_address: RayAddressOption = None,
    gpus_per_worker: GpusOption = None,
    cpus_per_worker: CpusOption = 1,
    as_json: JsonOption = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustOption = False,
) -> None:
    """Remove layers or heads, and save a checkpoint that plain transformers loads.

    Examples:

    \b
      tappa prune --layers 9 --dry-run
      tappa prune model.gguf --layers 20% --out smaller
      tappa prune model.gguf --layers 6 --order bi_prime --beta 0.3 --out smaller
      tappa prune ./my-model --layers 4 --order greedy --windows 4 --out smaller
      tappa prune ./my-model --kv-groups 1 --importance dissimilarity --out smaller
    """
    wanted = pruning.Amounts(
        *(_layers(layers), query_heads, kv_groups, order, beta, seed),
        importance=importance,  # type: ignore[arg-type]  # checked below
    )
    if not dry_run:
        if not (wanted.layers or wanted.query_heads or wanted.kv_groups):
            raise PruningError("nothing to remove: expected --layers, --query-heads or --kv-groups")
        _check_target(out, force, model)
    kind = pruning.check_plot(plot) if plot is not None else ""
    first, second = packaged_halves()
    known, held = texts_of(text, first), texts_of(None if held_out is None else [held_out], second)
    errors = messages()
    source = cluster.ModelSource(model, device, dtype, trust_remote_code)
    placement = cluster.Placement(workers, ray_address, gpus_per_worker, cpus_per_worker)
    with errors.status("loading the model"):
        loaded = cluster.for_this_process(source, placement).load()
    wanted.check(loaded.model)
    windows_of = partial(pruning.Windows.of, *loaded, window=window, limit=windows)
    calibration_windows = windows_of(known, stride=stride)
    held_windows = windows_of(held, stride=window)
    if dry_run:
        say(errors, cluster.estimate_calibration(model, calibration_windows, placement))
    else:
        require_whole(loaded.model, "remove layers or heads")
    job = (source, placement, loaded.model, calibration_windows)
    with cluster.following(errors, "calibrating", "pieces") as follow:
        found = cluster.calibrate_windows(*job, state=calibration, console=errors, follow=follow)
    with progress(errors, "choosing", "measured") as update:
        chosen = pruning.plan(loaded.model, found, wanted, calibration_windows, progress=update)
    if plot is not None:
        write_atomic(plot, pruning.plot(found, chosen, kind))
        say(errors, f"wrote {plot}")
    if dry_run or out is None:
        print(pruning.as_json(found, chosen) if as_json else render_plan(found, chosen))
        return
    names = _names(text, held_out)
    with progress(errors, "measuring", "windows") as update:
        figures = pruning.remove_and_save(
            *(loaded, found, chosen, held_windows, out), texts=names, force=force, progress=update
        )
    if as_json:
        print(pruning.as_json(found, chosen, figures, names))
        return
    print(f"{render_plan(found, chosen)}\n{pruning.figures_table(*figures)}")
    print(f"wrote {out}: a checkpoint for AutoModelForCausalLM, README.md and pruning.json")


def _layers(text: str) -> int | float:
    """`6` -> 6, `20%` and `0.2` -> 0.2. Raises PruningError."""
    number = text.strip()
    try:
        return int(number)
    except ValueError:
        pass
    try:
        return float(number[:-1]) / 100 if number.endswith("%") else float(number)
    except ValueError:
        raise PruningError(f"expected layers as a number or a share (20%), got {text!r}") from None


def _check_target(out: Path | None, force: bool, model: str | None) -> None:
    if out is None:
        raise PruningError("expected --out FOLDER for the checkpoint, or --dry-run")
    pruning.check_target(out, force=force, source=model)


def _names(text: list[Path] | None, held_out: Path | None) -> dict[str, str]:
    """What the checkpoint's card says of the texts."""
    return {
        "calibration": ", ".join(p.name for p in text or []) or "first half of the packaged text",
        "held_out": held_out.name if held_out else "second half of the packaged text",
    }
