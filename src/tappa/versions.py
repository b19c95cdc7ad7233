"""Versions of transformers that tappa was tested with."""

import warnings

import transformers
from packaging.version import Version

TESTED = "5.2.0", "5.24.0"  # the oldest and the newest: constraints-peers.txt, constraints.txt


class UntestedVersionWarning(UserWarning):
    """A transformers newer than any that tappa was tested with."""


def check_versions(installed: str = transformers.__version__) -> None:
    """Warn of a transformers newer than the tested ones, in one line."""
    oldest, newest = TESTED
    if Version(Version(installed).base_version) > Version(newest):
        warnings.warn(
            f"tappa was tested with transformers {oldest} to {newest}, this is {installed}",
            UntestedVersionWarning,
            stacklevel=3,
        )
