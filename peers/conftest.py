import os
import warnings

import pytest
import torch
from torch import Tensor

import tappa.models
from tappa.models import LoadedModel
from tappa.texts import encode_texts, packaged_text

with warnings.catch_warnings(action="ignore"):  # kvpress imports fire, which imports pipes
    import kvpress  # noqa: F401

torch.set_num_threads(int(os.environ.get("TAPPA_TEST_THREADS", "1")))


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    """The default model in float32 on the CPU, whatever else is there."""
    return tappa.models.load(device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def eager_smollm2() -> LoadedModel:
    """The same with attention weights, for ObservedAttentionPress."""
    return tappa.models.load(device="cpu", dtype="float32", attn_implementation="eager")


@pytest.fixture(scope="session")
def ids(smollm2: LoadedModel) -> Tensor:
    """1000 tokens of the packaged text."""
    return torch.tensor(encode_texts(smollm2.tokenizer, [packaged_text()], 1000))
