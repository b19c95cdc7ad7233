"""What the tests of loading share."""

import pytest
import torch

from tappa.errors import ModelError
from tappa.models import load

PROMPT = torch.arange(3, 43)[None]


def refusal(name, **options):
    """The one line with which load() refuses."""
    with pytest.raises(ModelError) as caught:
        load(str(name), **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    return message
