"""Grids: one prefill for all cells, files that can be resumed, tables that pair samples."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import tappa
from near_ties import watched
from tappa.cache_argument import with_cache
from tappa.errors import CompressionError, EvaluationError
from tappa.evaluation.evaluate import Evaluation, describe_outcome, evaluate
from tappa.evaluation.fidelity import Reference, windows
from tappa.evaluation.grid import batches_of, run_grid
from tappa.evaluation.harness import TappaLM, read
from tappa.evaluation.samples import TextSample
from tappa.evaluation.shared_prefill import Cell, GridLM, cells_of
from tappa.evaluation.statistics import paired_difference
from tappa.evaluation.suites import Source, check_names, samples_of
from tappa.evaluation.tables import memory_markdown, read_samples, tables_of, to_markdown
from tappa.models import LoadedModel
from tappa.texts import packaged_text

pytestmark = pytest.mark.xdist_group("smollm2")
METHODS = ("full", "snapkv", "tappa(gamma=0.0)", "h2o")
CELLS = cells_of(METHODS, (40, 64))


@pytest.fixture(scope="module")
def lm(smollm2: LoadedModel) -> GridLM:
    return GridLM(smollm2.model, smollm2.tokenizer)


def text_samples(lm: GridLM, count: int, context: int = 150) -> list[TextSample]:
    ids = lm.tokenizer(packaged_text()[:20_000], verbose=False).input_ids
    parts = windows(ids, context + 11, count)
    return [TextSample("fidelity", n, w[:context], w[context:]) for n, w in enumerate(parts)]


def own_task(folder: Path) -> Path:
    """A folder with the task `goes_on`: texts of three lengths, to be continued by 11 tokens.

    Unlike the suites' texts they are the same with every Python.
    """
    text = packaged_text()
    texts = [text[2000:2700], text[3000:3500], text[4000:4400]]
    folder.mkdir()
    lines = [json.dumps({"text": text, "next": "and"}) for text in texts]
    (folder / "texts.jsonl").write_text("\n".join(lines))
    task = {
        "task": "goes_on",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "texts.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{next}}",
        "generation_kwargs": {"until": ["@@"], "max_gen_toks": 11, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    (folder / "goes_on.yaml").write_text(json.dumps(task))
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.json"))}


def without_times(content: bytes) -> dict[str, Any]:
    record = json.loads(content)
    answers = [answer | {"compress_seconds": 0} for answer in record["answers"]]
    return record | {"prefill_seconds": 0, "cells_seconds": 0, "answers": answers}


# ---- cells and prompts


def test_a_method_that_drops_nothing_has_one_cell() -> None:
    assert CELLS[:3] == [Cell("full", None), Cell("snapkv", 40), Cell("snapkv", 64)]
    assert len(CELLS) == 7


@pytest.mark.parametrize(
    ("methods", "budgets", "words"),
    [
        (["snapvk"], [64], "did you mean"),
        (["snapkv(gama=1)"], [64], "no option 'gama'"),
        (["snapkv(gamma"], [64], "name\\(option=value"),
        (["tappa(gamma=x)"], [64], "option=value"),
        (["snapkv"], [5], "at least 32"),
        (["snapkv"], [1.5], "at most 1.0"),
    ],
)
def test_cells_that_cannot_work(methods: list[str], budgets: list[float], words: str) -> None:
    with pytest.raises(CompressionError, match=words):
        cells_of(methods, budgets)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_shared_prefill_answers_as_a_prefill_of_its_own(lm: GridLM, cell: Cell) -> None:
    """h2o's statistics over all queries included."""
    ids = torch.tensor([lm.tokenizer(packaged_text()[:700]).input_ids])
    lm.forget()
    lm.cells = list(CELLS)
    lm.answering([cell])
    shared = lm.cache_of(ids, torch.ones_like(ids))
    name, options = tappa.compression.parse_method(cell.method)
    alone = tappa.compressed(lm.model, name, cell.budget, **options)
    read(alone, ids, torch.ones_like(ids))
    assert shared.tokens_held() == alone.tokens_held()
    last = ids[:, -1:]
    with torch.inference_mode():
        mine, theirs = (lm.model(last, **with_cache(lm.model, c)).logits for c in (shared, alone))
    torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=1e-4)


def test_a_prompt_is_read_once(lm: GridLM, tmp_path: Path) -> None:
    before = lm.prefills
    outcome = run_grid(lm, text_samples(lm, 2), CELLS, tmp_path)
    assert lm.prefills - before == 2
    assert (outcome.answered, outcome.found, outcome.cells) == (2, 0, 7)
    assert outcome.seconds_saved == pytest.approx(6 * outcome.prefill_seconds)
    assert "read once for 7 cells" in describe_outcome(outcome)


def test_the_time_to_compress_is_kept_where_it_is_known(lm: GridLM, tmp_path: Path) -> None:
    run_grid(lm, text_samples(lm, 2), CELLS, tmp_path)
    frame = read_samples(tmp_path)
    assert (frame["compress_seconds"] > 0).all()
    of_budgets = frame[frame["method"] == "snapkv"].groupby(["number"])["compress_seconds"]
    assert (of_budgets.nunique() == 1).all()  # shared evenly: two budgets take as long
    table = tables_of(frame, "full")[0]
    mine = frame[(frame["method"] == "h2o") & (frame["budget"] == 40) & (frame["order"] == 0)]
    row = next(row for row in table.rows if (row.method, row.budget) == ("h2o", 40))
    assert row.compress_seconds == pytest.approx(mine["compress_seconds"].mean())
    assert f"{row.compress_seconds:.3f} |" in memory_markdown(frame)
    path = next((tmp_path / "samples").glob("*/00001.json"))
    older = json.loads(path.read_text())
    for answer in older["answers"]:
        del answer["compress_seconds"]
    path.write_text(json.dumps(older))
    outcome = run_grid(lm, text_samples(lm, 2), CELLS, tmp_path)  # is still resumed
    assert (outcome.answered, outcome.found) == (0, 2)
    frame = read_samples(tmp_path)
    assert all(row.compress_seconds is None for row in tables_of(frame, "full")[0].rows)
    assert "|  |\n" in memory_markdown(frame)


def test_the_grid_scores_as_lm_eval_does(lm: GridLM, smollm2: LoadedModel, tmp_path: Path) -> None:
    """The same samples through lm-eval's own evaluator, with the model type `tappa`."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    names = ["local_number_recall", "choice_arithmetic"]
    source = Source(limit=2, lengths=(700,))
    wanted = Evaluation(("full", "snapkv"), (64,), names, source)
    evaluate(smollm2.model, smollm2.tokenizer, wanted, tmp_path)
    frame = read_samples(tmp_path)
    for name in names:
        folder = tmp_path / "tasks" / name.split("_")[0]
        theirs = simple_evaluate(
            model=TappaLM(smollm2.model, "snapkv", 64, tokenizer=smollm2.tokenizer),
            tasks=[name],
            limit=2,
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            bootstrap_iters=0,
        )
        metric = "acc" if name.startswith("choice") else "score"
        samples = sorted(theirs["samples"][name], key=lambda s: s["doc_id"])
        mine = frame.query("task == @name and method == 'snapkv' and metric == @metric")
        assert mine["value"].tolist() == [pytest.approx(s[metric]) for s in samples]


def test_cells_that_write_side_by_side_write_what_each_writes_alone(
    lm: GridLM, tmp_path: Path
) -> None:
    source = Source(1, include=own_task(tmp_path / "own"))
    sample = samples_of(["goes_on"], lm, source, tmp_path)[0]
    lm.cells = cells_of(["full", "snapkv", "tappa", "cake", "streaming_llm"], [40, 64])
    lm.forget()
    together = sample.answers(lm, lm.cells)
    lm.forget()
    with watched(lm.model, cuts=False) as seen:
        alone = [sample.answers(lm, [cell])[0] for cell in lm.cells]
    seen.check_clear()
    assert together == alone
    assert len({answer["response"][0] for answer in together}) > 2


def test_samples_answered_together_get_the_answers_of_each_alone(
    lm: GridLM, tmp_path: Path
) -> None:
    """Prompts of different lengths, padded on the left; also where only some are missing."""
    source = Source(3, include=own_task(tmp_path / "own"))
    samples = samples_of(["goes_on"], lm, source, tmp_path / "tasks")
    cells = cells_of(["full", "snapkv", "tappa"], [40, 64])
    with watched(lm.model, cuts=False) as seen:
        run_grid(lm, samples, cells, tmp_path / "alone")
    seen.check_clear()
    run_grid(lm, samples[1:2], cells, tmp_path / "together")
    outcome = run_grid(lm, samples, cells, tmp_path / "together", batch=3)
    assert (outcome.found, outcome.answered) == (1, 2)
    alone, together = (files_of(tmp_path / x / "samples") for x in ("alone", "together"))
    assert alone.keys() == together.keys()
    for name in alone:
        mine, theirs = json.loads(alone[name]), json.loads(together[name])
        for a, b in zip(mine["answers"], theirs["answers"], strict=True):
            assert (a["response"], a["scores"]) == (b["response"], b["scores"])


def testbatches_of_are_of_one_task_each_in_order(lm: GridLM, tmp_path: Path) -> None:
    samples = samples_of(["fidelity", "perplexity"], lm, Source(5, (300,)), tmp_path)
    samples.sort(key=lambda sample: sample.number)
    found = [[(s.task, s.number) for s in batch] for batch in batches_of(samples, 2)]
    assert found == [
        [(task, number) for number in numbers]
        for numbers in ((0, 1), (2, 3), (4,))
        for task in ("fidelity", "perplexity")
    ]


# ---- fidelity


def test_fidelity_of_the_full_cache_is_perfect_and_falls_with_the_budget(lm: GridLM) -> None:
    sample = text_samples(lm, 1)[0]
    lm.forget()
    lm.cells = cells_of(["full", "streaming_llm"], [36, 150])
    answers = sample.answers(lm, lm.cells)
    found = {cell.budget: answer for cell, answer in zip(lm.cells, answers, strict=True)}
    full, small, whole = found[None]["scores"], found[36]["scores"], found[150]["scores"]
    assert full["kl"] == pytest.approx(0, abs=1e-6)
    assert (full["top1"], full["attention_error"]) == (1, 0)
    assert whole["kl"] == pytest.approx(0, abs=1e-5)
    assert small["kl"] > 0.01
    assert small["attention_error"] > 0.01
    assert len(found[36]["layers"]) == 30


def test_fidelity_by_hand(smollm2: LoadedModel) -> None:
    """KL, agreement and NLL from logits of forward passes without any cache."""
    ids = smollm2.tokenizer(packaged_text()[:900]).input_ids[:97]
    context, following = ids[:90], ids[90:]
    with torch.inference_mode():
        logits = smollm2.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    full = tappa.compressed(smollm2.model, "full")
    read(full, torch.tensor([context]), torch.ones(1, 90, dtype=torch.int64))
    reference = Reference(full.copy(), context[-1], following)
    nll = -sum(float(logits[89 + i, token]) for i, token in enumerate(following)) / 7
    assert reference.compare(full.copy())[0]["nll"] == pytest.approx(nll, abs=1e-4)
    small = tappa.compressed(smollm2.model, "streaming_llm", 40)
    read(small, torch.tensor([context]), torch.ones(1, 90, dtype=torch.int64))
    found = reference.compare(small.copy())[0]
    small.frozen = True
    tail = torch.tensor([[context[-1], *following[:-1]]])
    with torch.inference_mode():
        other = (
            smollm2.model(tail, **with_cache(smollm2.model, small))
            .logits[0]
            .double()
            .log_softmax(-1)
        )
    p = logits[89:96]
    assert found["kl"] == pytest.approx(float((p.exp() * (p - other)).sum(-1).mean()), abs=1e-4)
    same = float((p.argmax(-1) == other.argmax(-1)).double().mean())
    assert found["top1"] == pytest.approx(same)


def test_windows_keep_halves_apart() -> None:
    parts = windows(list(range(1000)), 31, 8, seed=3)
    assert parts == windows(list(range(1000)), 31, 12, seed=3)[:8]
    assert all(max(w) < 500 for w in parts[::2])
    assert all(min(w) >= 500 for w in parts[1::2])
    assert all(w == list(range(w[0], w[0] + 31)) for w in parts)
    with pytest.raises(EvaluationError, match="more than 62 tokens"):
        windows(list(range(60)), 31, 1)


# ---- on disk


def test_finished_samples_are_kept(lm: GridLM, tmp_path: Path) -> None:
    samples = text_samples(lm, 3)
    run_grid(lm, samples[:2], CELLS, tmp_path)
    before = files_of(tmp_path)
    outcome = run_grid(lm, samples, CELLS, tmp_path)
    assert (outcome.answered, outcome.found) == (1, 2)
    after = files_of(tmp_path)
    assert {name: after[name] for name in before} == before
    assert len(after) == 3


def test_shards_fill_one_folder(lm: GridLM, tmp_path: Path) -> None:
    samples = text_samples(lm, 3)
    for shard in ((1, 2), (0, 2)):
        run_grid(lm, samples, CELLS[:2], tmp_path / "two", shard=shard)
    run_grid(lm, samples, CELLS[:2], tmp_path / "one")
    one, two = (files_of(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, content in one.items():
        assert without_times(content) == without_times(two[name])


def test_an_answer_to_another_prompt_is_refused(lm: GridLM, tmp_path: Path) -> None:
    run_grid(lm, text_samples(lm, 1), CELLS[:2], tmp_path)
    with pytest.raises(EvaluationError, match="another prompt"):
        run_grid(lm, text_samples(lm, 1, context=140), CELLS[:2], tmp_path)


def test_the_first_interrupt_finishes_the_sample(lm: GridLM, tmp_path: Path) -> None:
    samples = text_samples(lm, 4)
    calls = []

    def press(done: int, total: int) -> None:
        calls.append(done)
        if calls == [0, 1]:
            os.kill(os.getpid(), signal.SIGINT)

    outcome = run_grid(lm, samples, CELLS[:2], tmp_path, progress=press)
    assert outcome.left == 3
    assert len(files_of(tmp_path)) == outcome.answered == 1
    assert "left by the interrupt" in describe_outcome(outcome)

    def press_twice(done: int, total: int) -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    with pytest.raises(KeyboardInterrupt):
        run_grid(lm, samples, CELLS[:2], tmp_path, progress=press_twice)


def test_the_folder_tells_how_answers_came_about(smollm2: LoadedModel, tmp_path: Path) -> None:
    wanted = Evaluation(("full", "snapkv"), (64,), ["fidelity"], Source(1, (300,)))
    evaluate(smollm2.model, smollm2.tokenizer, wanted, tmp_path)
    run = json.loads((tmp_path / "grid.json").read_text())["run"]
    assert run["versions"]["lm_eval"] == "0.4.13"
    assert run["dtype"] == "float32"


SCRIPT = """
import sys, time
from pathlib import Path
import tappa
from tappa.evaluation import store
from tappa.evaluation.evaluate import Evaluation, Source, evaluate
model, tokenizer = tappa.load()
wanted = Evaluation(("full", "snapkv"), (64,), ["fidelity"], Source(4, (300,)))
if len(sys.argv) > 2:  # slow enough to be killed in the middle
    write = store.write_atomic
    store.write_atomic = lambda *a: (write(*a), print("written", flush=True), time.sleep(1))
evaluate(model, tokenizer, wanted, Path(sys.argv[1]))
"""


def test_a_killed_run_goes_on(smollm2: LoadedModel, tmp_path: Path) -> None:
    """SIGKILL after the second sample: the next run keeps both and ends as an undisturbed one."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # sums in the same order
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "killed"), "slow"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for _ in range(4):  # grid.json twice, and two samples
            assert process.stdout.readline() == "written\n"
        process.kill()
    kept = files_of(tmp_path / "killed" / "samples")
    assert len(kept) == 2
    wanted = Evaluation(("full", "snapkv"), (64,), ["fidelity"], Source(4, (300,)))
    for name in ("killed", "whole"):
        results = evaluate(smollm2.model, smollm2.tokenizer, wanted, tmp_path / name)
        assert results.outcome.found == (2 if name == "killed" else 0)
    killed, whole = (files_of(tmp_path / name / "samples") for name in ("killed", "whole"))
    assert {name: killed[name] for name in kept} == kept
    assert killed.keys() == whole.keys()
    for name in killed:
        a, b = without_times(killed[name]), without_times(whole[name])
        for mine, theirs in zip(a["answers"], b["answers"], strict=True):
            assert mine["scores"] == pytest.approx(theirs["scores"], abs=1e-4)


# ---- tables


def frame_of(values: dict[tuple[str, float | None], list[float]], task: str = "t") -> pd.DataFrame:
    lines = [
        {
            "suite": "s",
            "task": task,
            "number": number,
            "method": method,
            "budget": math.nan if budget is None else budget,
            "tokens_held": 1.0,
            "nbytes": 2.0,
            "metric": "score",
            "order": 0,
            "value": value,
        }
        for (method, budget), scores in values.items()
        for number, value in enumerate(scores)
    ]
    return pd.DataFrame(lines)


def test_a_table_by_hand() -> None:
    scores: dict[tuple[str, float | None], list[float]] = {
        ("full", None): [1, 1, 1, 1],
        ("cake", 64.0): [1, 0, 0, 0],
        ("tappa", 64.0): [1, 1, 1, 1],
        ("snapkv", 64.0): [0, 0, 0, 0],
    }
    table = tables_of(frame_of(scores).sample(frac=1, random_state=1), "cake")[0]
    rows = {row.method: row for row in table.rows}
    assert rows["tappa"].mean == 1
    assert rows["tappa"].difference == 0.75
    by_scipy = paired_difference([1, 1, 1, 1], [1, 0, 0, 0])
    assert (rows["tappa"].low, rows["tappa"].p) == (by_scipy.low, by_scipy.p)
    # flips of three ones: 2 of 8 are as far; of a single one: both; Holm doubles the smaller
    assert (rows["tappa"].p, rows["tappa"].p_holm) == (0.25, 0.5)
    assert (rows["snapkv"].p, rows["snapkv"].p_holm) == (1, 1)
    assert rows["full"].difference is None
    text = to_markdown(table)
    assert "| tappa | 1.000 ± 0.000 (+0.750 [+0.250, +1.000]; p = .500) |" in text
    assert "| full | 1.000 ± 0.000 |" in text


def test_an_average_over_tasks_and_what_must_match() -> None:
    a = frame_of({("cake", 64.0): [0, 0], ("tappa", 64.0): [1, 1]}, "a")
    b = frame_of({("cake", 64.0): [0, 0, 0, 1], ("tappa", 64.0): [0, 0, 0, 1]}, "b")
    tables = tables_of(pd.concat([a, b]), "cake")
    assert [table.name for table in tables] == ["a", "b", "s: average of 2 tasks"]
    row = next(row for row in tables[2].rows if row.method == "tappa")
    assert (row.n, row.mean, row.difference) == (6, 0.625, 0.5)
    with pytest.raises(EvaluationError, match="baseline out of cake, tappa"):
        tables_of(a, "snapkv")
    lost = a[~((a["method"] == "tappa") & (a["number"] == 1))]
    with pytest.raises(EvaluationError, match="different samples"):
        tables_of(lost, "cake")


def test_a_model_too_weak_for_a_task_is_told() -> None:
    weak = frame_of({("full", None): [0, 0, 0, 0], ("cake", 64.0): [0, 0, 0, 0]})
    assert "too low to tell methods apart" in to_markdown(tables_of(weak, "cake")[0])
    easy = frame_of({("full", None): [1, 1], ("cake", 64.0): [1, 1]})
    assert "at the ceiling" in to_markdown(tables_of(easy, "cake")[0])


# ---- bad input


def test_names_and_data(lm: GridLM, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="did you mean fidelity"):
        check_names(["fidelty"], None)
    with pytest.raises(EvaluationError, match="expected a folder of data"):
        check_names(["fidelity"], tmp_path / "none")
    with pytest.raises(EvaluationError, match="expected LongBench"):
        samples_of(["longbench"], lm, Source(data=tmp_path), tmp_path / "tasks")
    with pytest.raises(EvaluationError, match="more than the model's context"):
        samples_of(["fidelity"], lm, Source(lengths=(10**6,)), tmp_path / "tasks")
    for task, least in (("fidelity", 66), ("perplexity", 4)):
        with pytest.raises(EvaluationError, match=f"too few for {task}, which needs {least}$"):
            samples_of([task], lm, Source(lengths=(least - 1,)), tmp_path / "tasks")
    with pytest.raises(EvaluationError, match="local_number_recall"):
        samples_of(["local_numbr_recall"], lm, Source(1, (700,)), tmp_path / "tasks")


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (Evaluation(methods=[]), "at least one method"),
        (Evaluation(half="middle"), "tune or report"),
        (Evaluation(baseline="adakv"), "baseline out of"),
    ],
)
def test_an_evaluation_that_cannot_work(wanted: Evaluation, words: str) -> None:
    with pytest.raises(EvaluationError, match=words):
        wanted.cells()
