"""The calibration of `tappa prune` on many workers: each does a few windows of text."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedModel

from tappa.cluster.analyze import do_pieces
from tappa.cluster.pieces import Pieces
from tappa.cluster.pool import ModelSource, Placement, Pool, Worker, open_pool
from tappa.cluster.progress import Follow, ignore
from tappa.pruning import Calibration, Windows
from tappa.pruning.calibration import (
    EVERY,
    calibrate_on,
    calibrate_piece,
    identity_of,
    keep,
    resume,
)


@dataclass(frozen=True)
class _Piece:
    """One piece of work."""

    source: ModelSource
    ids: list[list[int]]
    settings: dict[str, int]


def calibrate_windows(
    source: ModelSource,
    placement: Placement,
    model: PreTrainedModel,
    windows: Windows,
    *,
    console: Console,
    state: Path | None = None,
    follow: Follow = ignore,
) -> Calibration:
    """`calibrate_on`, in process or by workers; `model` is what the source loads."""
    if placement.in_process:
        found = calibrate_on(
            *(model, windows),
            state=state,
            progress=lambda done, total: follow(done, total, 0, 0),
        )
        if state is not None:  # what workers may have left is in it now
            shutil.rmtree(_folder(state), ignore_errors=True)
        return found
    with open_pool(source, placement, console) as pool:
        return calibrate_by(pool, model, windows, state=state, follow=follow)


def calibrate_by(
    pool: Pool,
    model: PreTrainedModel,
    windows: Windows,
    *,
    state: Path | None = None,
    follow: Follow = ignore,
) -> Calibration:
    """`calibrate_on` by a pool: the same sums to the last bit, where kernels give the same.

    `model` is the one that the pool's source loads. `state` is the file of `calibrate_on`, which
    either of them takes up; pieces that are done before earlier ones wait in a folder beside it.
    Raises ClusterError for pieces that failed, and what `calibrate_on` raises.
    """
    identity = identity_of(model, windows)
    parts = [windows.ids[i : i + EVERY] for i in range(0, len(windows.ids), EVERY)]
    folder = None if state is None else _folder(state)
    known = None
    if state is not None and state.is_file():
        known = resume(state, identity, model, windows)
    pieces = Pieces(
        *(len(parts), Calibration.merge, Calibration.save, Calibration.load),
        folder=folder,
        merged=known,
        count=0 if known is None else -(-known.windows // EVERY),
    )
    if pieces.missing:
        pieces.open({"calibration": identity})
        jobs = {
            f"piece {n}": _Piece(pool.source, parts[n], windows.settings) for n in pieces.missing
        }
        do_pieces(pool, _calibrate_piece, jobs, pieces, follow)
    found = pieces.result()
    if state is not None:
        keep(found, state, identity)
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
    return found


def _folder(state: Path) -> Path:
    """Of pieces that are done before earlier ones."""
    return state.with_name(state.name + ".pieces")


def _calibrate_piece(worker: Worker, piece: _Piece) -> Calibration:
    model, _ = worker.model(piece.source)
    return calibrate_piece(model, piece.ids, piece.settings)
