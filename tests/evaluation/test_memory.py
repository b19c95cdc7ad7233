"""Where memory does not suffice: a smaller batch, the same answers, one line."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from short_memory import out_of_memory, short_of_memory
from tappa.errors import EvaluationError
from tappa.evaluation.grid import run_grid
from tappa.evaluation.harness import TappaLM
from tappa.evaluation.memory import Room, is_out_of_memory
from tappa.evaluation.shared_prefill import GridLM, cells_of
from tappa.evaluation.store import Record, read_record
from tappa.evaluation.suites import Source, samples_of
from tappa.models import LoadedModel
from tiny import tiny_model, tiny_tokenizer

CELLS = cells_of(["full", "snapkv", "streaming_llm"], [40, 64])
ALLOCATION = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    model = tiny_model("llama", num_hidden_layers=1, max_position_embeddings=2048)
    return LoadedModel(model, tiny_tokenizer())


@pytest.fixture(scope="module")
def lm(tiny: LoadedModel) -> GridLM:
    return GridLM(tiny.model, tiny.tokenizer)


def samples(lm: GridLM, folder: Path) -> list[Any]:
    names = ["local_number_recall", "fidelity", "choice_arithmetic"]
    return samples_of(names, lm, Source(5, (1500,)), folder)


@pytest.fixture(scope="module")
def whole(lm: GridLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run_grid(lm, samples(lm, folder / "tasks"), CELLS, folder)
    return folder


def records(folder: Path) -> dict[str, Record]:
    paths = sorted((folder / "samples").glob("*/*.json"))
    found = {f"{path.parent.name}/{path.name}": read_record(path) for path in paths}
    return {name: record for name, record in found.items() if record is not None}


def check_same(mine: Path, theirs: Path) -> None:
    """Every sample once, every cell once and in order, numbers but for sums in another order."""
    found, wanted = records(mine), records(theirs)
    assert found.keys() == wanted.keys()
    assert len(wanted) == 15
    for name, record in wanted.items():
        for one, other in zip(found[name]["answers"], record["answers"], strict=True):
            assert (one["method"], one["budget"]) == (other["method"], other["budget"])
            for kind in ("kl", "nll"):
                expected = other["scores"].get(kind)
                assert one["scores"].get(kind) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("error", "rows", "said"),
    [
        (None, 99, []),
        (None, 10, ["4 samples", "2"]),
        (RuntimeError(ALLOCATION), 5, ["4 samples", "2", "2 samples", "1"]),
        (MemoryError(), 4, ["4 samples", "2", "2 samples", "1"]),
        (None, 1, ["4 samples", "2", "2 samples", "1", "5 cells", "2", "2 cells", "1"]),
    ],
)
def test_a_batch_is_halved_until_it_fits(
    lm: GridLM,
    tiny: LoadedModel,
    whole: Path,
    tmp_path: Path,
    error: Exception | None,
    rows: int,
    said: list[str],
) -> None:
    """Rows are samples x cells: 4 x 4 of those that compress."""
    lines: list[str] = []
    with short_of_memory(tiny.model, rows, error):
        made = samples(lm, tmp_path / "tasks")
        outcome = run_grid(lm, made, CELLS, tmp_path, batch=4, say=lines.append)
    assert outcome.answered == 15
    check_same(tmp_path, whole)
    mine = [line for line in lines if "local_number_recall" in line]
    assert mine == [
        f"out of memory in local_number_recall with {what} together: going on with {less}"
        for what, less in zip(said[::2], said[1::2], strict=True)
    ]


def test_where_nothing_fits_it_says_so(lm: GridLM, tiny: LoadedModel, tmp_path: Path) -> None:
    made = samples(lm, tmp_path / "tasks")[:5]
    with (
        short_of_memory(tiny.model, 0),
        pytest.raises(EvaluationError, match="with 1 samples in 1 cells: CUDA out of") as caught,
    ):
        run_grid(lm, made, CELLS, tmp_path, batch=4)
    assert "\n" not in str(caught.value)
    assert run_grid(lm, made, CELLS, tmp_path).answered == 5


def test_other_errors_are_not_hidden(lm: GridLM, tiny: LoadedModel, tmp_path: Path) -> None:
    made = samples(lm, tmp_path / "tasks")[:2]
    shapes = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with short_of_memory(tiny.model, 0, shapes), pytest.raises(RuntimeError, match="shapes"):
        run_grid(lm, made, CELLS, tmp_path, batch=2)


def test_processes_of_torchrun_do_not_halve(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them alone would wait for the others for ever."""
    monkeypatch.setattr("tappa.evaluation.memory.rank_of_torchrun", lambda: 0)
    with pytest.raises(EvaluationError, match="choose a smaller batch"):
        Room().shrink("fidelity", 4, 5, out_of_memory())


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (out_of_memory(), True),
        (RuntimeError(ALLOCATION), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_lm_evals_batches_are_halved_too(
    tiny: LoadedModel, rows: int, caplog: pytest.LogCaptureFixture
) -> None:
    lm = TappaLM(tiny.model, "snapkv", 40, tokenizer=tiny.tokenizer, batch_size=5)
    texts = [f"The number {n} stands here. " * (n + 3) for n in range(7)]
    ids, mask = lm.tok_batch_encode(texts)
    expected = lm._model_generate(ids, ids.shape[1] + 9, ["</s>"], mask)
    with short_of_memory(tiny.model, rows):
        found = lm._model_generate(ids, ids.shape[1] + 9, ["</s>"], mask)
        asked = {"until": ["\n\n"], "max_gen_toks": 5, "do_sample": False}
        answers = lm.generate_until(
            [
                Instance(request_type="generate_until", doc={}, arguments=(x, asked), idx=n)
                for n, x in enumerate(texts)
            ],
            disable_tqdm=True,
        )
    assert found.shape[0] == 7
    assert torch.equal(found[:, : ids.shape[1]], ids)  # the prompts, in their order
    assert found.shape == expected.shape
    assert len(answers) == 7
    assert lm.most_rows == {1: 1, 2: 1, 3: 3}[rows]
    assert "out of memory with a batch of 7: going on with 3" in caplog.text


def test_answers_that_end_early_are_padded(tiny: LoadedModel) -> None:
    lm = TappaLM(tiny.model, "snapkv", 40, tokenizer=tiny.tokenizer)
    parts = [torch.tensor([[5, 7]]), torch.tensor([[11, 13, 17], [19, 23, 29]])]
    assert lm._as_one(parts).tolist() == [[5, 7, 0], [11, 13, 17], [19, 23, 29]]
