"""tappa: why attention heads do what they do, and what that is good for."""

from tappa.analysis import Analysis, analyze
from tappa.compression import compress_context, compressed, estimate, generate, record
from tappa.errors import TappaError
from tappa.layer_statistics import Settings
from tappa.models import load
from tappa.pruning import Calibration, calibrate, prune
from tappa.versions import check_versions

__version__ = "0.1.0"
__all__ = [
    "Analysis",
    "Calibration",
    "Settings",
    "TappaError",
    "analyze",
    "calibrate",
    "compress_context",
    "compressed",
    "estimate",
    "generate",
    "load",
    "prune",
    "record",
]

check_versions()
