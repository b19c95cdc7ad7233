"""The same work on many workers: shards of texts and cells of a grid, on Ray or in process."""

from tappa.cluster.analyze import analyze_texts, look_at, state_folder
from tappa.cluster.calibrate import calibrate_by, calibrate_windows
from tappa.cluster.estimate import estimate_analysis, estimate_calibration, estimate_grid
from tappa.cluster.pool import (
    Failed,
    Finished,
    InProcess,
    ModelSource,
    Placement,
    Pool,
    for_this_process,
    open_pool,
)
from tappa.cluster.progress import following

__all__ = [
    "Failed",
    "Finished",
    "InProcess",
    "ModelSource",
    "Placement",
    "Pool",
    "analyze_texts",
    "calibrate_by",
    "calibrate_windows",
    "estimate_analysis",
    "estimate_calibration",
    "estimate_grid",
    "following",
    "for_this_process",
    "look_at",
    "open_pool",
    "state_folder",
]
