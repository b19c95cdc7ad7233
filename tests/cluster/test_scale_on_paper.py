"""docs/scale.md has the tables that runs/scale.py prints, and those the sizes of the code."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tappa
from tappa.cache_argument import with_cache
from tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def scale() -> Any:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("scale", ROOT / "runs" / "scale.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scale"] = module  # where its dataclass looks for itself
    spec.loader.exec_module(module)
    return module


def test_the_document_has_the_numbers_of_the_script(
    scale: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    scale.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    written = (ROOT / "docs" / "scale.md").read_text().splitlines()
    assert len(rows) > 20
    assert [row for row in rows if row not in written] == []


def test_sizes_are_those_of_the_code(scale: Any) -> None:
    model = tiny_model("llama")
    config = model.config
    shape = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    count = sum(p.numel() for p in model.parameters())
    size = scale.Size("tiny", count, config.num_hidden_layers, *shape, config.hidden_size)
    analysis = tappa.analyze(model, tiny_tokenizer(), "It is a truth universally acknowledged")
    sums = sum(x.nbytes for layer in analysis.layers for x in layer.sums.values())
    assert sums == pytest.approx(size.sums, rel=0.02)
    ids = torch.arange(67)[None] % 90 + 5
    cache = tappa.compressed(model, "full")
    with torch.inference_mode():
        model(ids, **with_cache(model, cache))
    assert cache.nbytes == 2 * size.cache(67)  # float32 here, bfloat16 there
