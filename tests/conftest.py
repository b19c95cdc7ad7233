from collections.abc import Iterator

import jaxtyping
import pytest
import torch

import tappa.models
from tappa.models import LoadedModel

torch.set_num_threads(1)  # one for each xdist worker: more of them only wait for each other


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    """The default model. Mark its tests with `xdist_group("smollm2")`: one load for all."""
    return tappa.models.load()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty folder in the place of tappa's cache."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("TAPPA_CACHE", str(folder))
    return folder


@pytest.fixture
def as_users_run_it() -> Iterator[None]:
    """Without the type checks of the tests, which would be faster to refuse."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
