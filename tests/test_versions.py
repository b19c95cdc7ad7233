"""The versions that are said to be tested are those that the tests' environments pin."""

import re
import tomllib
import warnings
from pathlib import Path

import pytest

from tappa.versions import TESTED, UntestedVersionWarning, check_versions

ROOT = Path(__file__).parents[1]


def pinned(file: str) -> str:
    found = re.search(r"^transformers==(\S+)$", (ROOT / file).read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def test_the_range_is_that_of_the_environments() -> None:
    assert (pinned("constraints-peers.txt"), pinned("constraints.txt")) == TESTED
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = next(d for d in project["dependencies"] if d.startswith("transformers"))
    assert oldest.partition(">=")[2] == TESTED[0].removesuffix(".0")


def test_a_newer_transformers_gives_one_warning_that_names_the_range() -> None:
    with pytest.warns(
        UntestedVersionWarning, match=r"5\.2\.0 to 5\.24\.0, this is 6\.1\.3$"
    ) as told:
        check_versions("6.1.3")
    assert len(told) == 1


@pytest.mark.parametrize("version", [*TESTED, "5.17.0", "5.24.0.dev0", "5.2.1"])
def test_tested_versions_give_none(version: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_versions(version)
