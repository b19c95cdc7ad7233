"""A model whose heads are split over two processes (gloo): everything as if it was whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import tappa
from conftest import Run
from near_ties import watched
from split_model import METHODS, TEXTS, WRITING, commands, kept, written
from tappa.analysis import Analysis
from tappa.errors import CaptureError, ModelError
from tappa.layer_statistics import LayerStatistics
from tappa.pruning import Calibration, calibrate
from tappa.report.looking import look
from tappa.report.views import load_views
from tappa.tensor_parallel import HeadShards
from tiny import save_tiny

SCRIPT = Path(__file__).parents[1] / "split_model.py"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six query heads and two KV heads: three and one for each rank."""
    folder = tmp_path_factory.mktemp("split") / "model"
    return save_tiny(folder, num_key_value_heads=2)


@pytest.fixture(scope="module")
def split(model: Path) -> Path:
    """The folder to which two ranks wrote, and what they printed."""
    out = model.parent / "out"
    out.mkdir()
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
    standalone = ("--standalone", "--no-python", sys.executable, "-W", "error::FutureWarning")
    done = subprocess.run(
        [*torchrun, *standalone, str(SCRIPT), str(model), str(out)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (out / "printed").write_text(done.stdout)
    return out


def test_the_analysis_has_all_heads_under_their_numbers(model: Path, split: Path) -> None:
    found, whole = Analysis.load(split / "analysis.json"), tappa.analyze(*tappa.load(model), TEXTS)
    assert (found.model, found.prompts) == (whole.model, whole.prompts)
    for mine, theirs in zip(found.layers, whole.layers, strict=True):
        assert mine.sums.keys() == theirs.sums.keys()
        for name, values in theirs.sums.items():
            assert mine.sums[name].shape == values.shape, name
            if name not in ("tightness", "season_votes"):  # a rounding may move a vote
                np.testing.assert_allclose(
                    mine.sums[name], values, rtol=2e-3, atol=2e-3, err_msg=name
                )
    mine, theirs = (x.to_frame()["q_similarity"].to_numpy() for x in (found, whole))
    np.testing.assert_allclose(mine, theirs, atol=1e-5)
    assert np.abs(theirs - np.roll(theirs, 3)).min() > 1e-3  # the order matters


@pytest.mark.parametrize("method", METHODS)
def test_a_compressed_cache_keeps_the_same_tokens(model: Path, split: Path, method: str) -> None:
    with watched() as seen:
        whole = kept(tappa.load(model).model, method, range(2))
    seen.check_clear()
    ranks = [json.loads((split / f"kept-{rank}.json").read_text())[method] for rank in range(2)]
    found = [[heads[0] for heads in layer] for layer in zip(*ranks, strict=True)]
    assert found == whole
    held = [len(head) for layer in whole for head in layer]
    assert sum(held) < 90 * len(held)


@pytest.mark.parametrize("method", WRITING)
@pytest.mark.parametrize("graph", [False, True])
def test_text_is_written_as_by_the_whole_model(
    model: Path, split: Path, method: str, graph: bool
) -> None:
    """One by one and on fixed buffers, with many cuts."""
    tokens, held, seen = written(tappa.load(model).model, method, graph, range(2))
    ranks = [json.loads((split / f"written-{rank}.json").read_text()) for rank in range(2)]
    parts = [rank[f"{method} {graph}"] for rank in ranks]
    assert [part[0] for part in parts] == [tokens, tokens]
    assert [[a[0], b[0]] for a, b in zip(parts[0][1], parts[1][1], strict=True)] == held
    assert [part[2] for part in parts] == [seen, seen]
    assert sum(len(head) for heads in held for head in heads) < seen * len(held) * 2


def test_ranks_talk_only_where_tokens_are_dropped(split: Path) -> None:
    """Besides what the model itself has to say."""
    for rank in range(2):
        talk = json.loads((split / f"collectives-{rank}.json").read_text())
        assert talk["snapkv"][5:10] == [1, 1, 0, 0, 0]
        assert talk["adakv"][7:10] == [0, 0, 0]


def test_ranks_draw_the_same_tokens(split: Path) -> None:
    first, second = (json.loads((split / f"drawn-{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert len(set(first)) > 1


def test_the_calibration_and_the_views_have_all_heads(model: Path, split: Path) -> None:
    loaded = tappa.load(model)
    mine, whole = (
        Calibration.load(split / "calibration.json"),
        calibrate(*loaded, TEXTS, window=31, limit=3),
    )
    for name in ("cosines", "similarity", "output"):
        np.testing.assert_allclose(getattr(mine, name), getattr(whole, name), rtol=1e-4)
    (seen,) = load_views(split / "views.npz")
    with watched() as cuts:
        alone = look(*loaded, TEXTS[0], methods=("snapkv",))
    cuts.check_clear()
    assert seen.maps.shape == alone.maps.shape
    assert np.abs(seen.maps.astype(int) - alone.maps).max() <= 1
    np.testing.assert_array_equal(seen.kept, alone.kept)


def test_the_command_line_on_two_ranks(run: Run, model: Path, split: Path, tmp_path: Path) -> None:
    """One of them prints; files and figures are those of all heads."""
    code, alone, _ = run(*commands(model, tmp_path)[1])
    assert code == 0
    printed = [line for line in (split / "printed").read_text().splitlines() if line[:1] == "{"]
    assert len(printed) == 1
    mine, theirs = json.loads(printed[0]), json.loads(alone)
    assert (mine["model"], mine["prompts"]) == (theirs["model"], theirs["prompts"])
    assert len(mine["heads"]) == len(theirs["heads"]) == 12
    for one, other in zip(mine["heads"], theirs["heads"], strict=True):
        assert one["q_similarity"] == pytest.approx(other["q_similarity"], abs=1e-5)
    with watched() as cuts:
        code, _, _ = run(*commands(model, tmp_path)[0])
    cuts.check_clear()
    assert code == 0
    for folder in ("analysis", "results"):
        names = sorted(path.name for path in (tmp_path / folder).iterdir())
        assert sorted(path.name for path in (split / folder).iterdir()) == names
    answers = [
        json.loads((out / "results/samples/fidelity/00000.json").read_text())["answers"]
        for out in (split, tmp_path)
    ]
    for cell, same in zip(*answers, strict=True):
        assert (cell["tokens_held"], cell["nbytes"]) == (same["tokens_held"], same["nbytes"])
        assert cell["scores"] == pytest.approx(same["scores"], abs=1e-5)


def test_a_split_model_is_not_pruned(split: Path) -> None:
    for rank in range(2):
        message = (split / f"refused-{rank}").read_text()
        assert message.endswith("whole model to remove layers or heads, its heads are split over 2")


def test_one_rank_holds_everything() -> None:
    shards, x = HeadShards(), torch.arange(6.0).view(3, 2)
    assert shards.gather(x) is x
    assert shards.gather_padded(x, 0.0) is x
    assert torch.equal(shards.mine(x), x)
    assert HeadShards(1, 2).mine([2, 3, 5, 7]) == [5, 7]


def test_uneven_heads_are_refused() -> None:
    layer = LayerStatistics(0, [1.0], 1.0, {"vertical": np.zeros(4)})
    with pytest.raises(CaptureError, match="expected 7 heads in equal parts on 2 ranks"):
        layer.of_all_ranks(HeadShards(0, 2), 7)


def test_without_torchrun_it_says_so(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ModelError, match="torchrun"):
        tappa.load(model, device="tp")
