import pytest

import tappa.models
from tappa.models import LoadedModel


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
