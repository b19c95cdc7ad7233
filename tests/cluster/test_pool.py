"""Work in pieces without Ray: retries, interrupts, the folder as the state, merges in order."""

import io
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import tappa
from conftest import Run
from pools import TEXTS, Elsewhere, broken, raises_until, refused, times_two
from tappa.analysis import SHARDS, Analysis, shards_of
from tappa.cluster import (
    Finished,
    InProcess,
    ModelSource,
    Placement,
    analyze_texts,
    calibrate_by,
    open_pool,
)
from tappa.cluster.analyze import read_sums, write_sums
from tappa.cluster.pieces import Pieces
from tappa.cluster.pool import ATTEMPTS, Failed, call
from tappa.cluster.progress import following
from tappa.errors import AnalysisFileError, ClusterError, MissingExtraError, TextError
from tappa.pruning import Windows, calibrate_on
from tappa.pruning.calibration import EVERY
from tiny import save_tiny


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    folder = save_tiny(tmp_path_factory.mktemp("pool") / "model")
    return ModelSource(str(folder), device="cpu")


def check_same(mine: Analysis, theirs: Analysis) -> None:
    """To the last bit."""
    assert (mine.model, mine.prompts, mine.settings) == (
        theirs.model,
        theirs.prompts,
        theirs.settings,
    )
    for a, b in zip(mine.layers, theirs.layers, strict=True):
        assert a.sums.keys() == b.sums.keys()
        for name, value in b.sums.items():
            assert (a.sums[name].shape, a.sums[name].dtype) == (value.shape, value.dtype), name
            np.testing.assert_array_equal(a.sums[name], value, err_msg=name)


# ---- attempts


def test_a_job_is_tried_three_times(tmp_path: Path, source: ModelSource) -> None:
    pool = InProcess(source)
    jobs = {f"job {n}": (tmp_path / f"notes-{n}", n) for n in range(5)}
    found = {done.name: done for done in pool.run(raises_until, jobs)}
    assert ATTEMPTS == 3
    assert [found[f"job {n}"] for n in range(3)] == [Finished(f"job {n}", n + 1) for n in range(3)]
    assert found["job 3"] == Failed("job 3", "RuntimeError: call 3")
    assert found["job 4"] == Failed("job 4", "RuntimeError: call 3")
    assert len(pool.retried) == 1 + 2 + 3 + 3
    assert pool.retried[0] == "job 1, attempt 1 of 3: RuntimeError: call 1"


def test_what_the_caller_must_put_right_is_not_tried_again(source: ModelSource) -> None:
    pool = InProcess(source)
    with pytest.raises(TextError, match="too short"):
        list(pool.run(refused, {"job": None}))
    assert pool.retried == []
    with pytest.raises(ClusterError, match="broken: KeyError"):
        call(pool, broken, None)


def test_the_first_interrupt_finishes_the_job_at_hand(source: ModelSource) -> None:
    found = []
    for done in InProcess(source).run(times_two, {f"job {n}": n for n in range(5)}):
        found.append(done)
        if len(found) == 2:
            os.kill(os.getpid(), signal.SIGINT)
    assert found == [Finished("job 0", 0), Finished("job 1", 2)]


# ---- pieces


def strings(folder: Path | None, total: int) -> Pieces[str]:
    """Pieces that are texts, merged by writing them one after the other."""
    return Pieces(
        total,
        lambda a, b: a + b,
        lambda text, path: path.write_text(text),
        lambda path: path.read_text(),
        folder,
    )


@given(order=st.permutations(range(7)), killed=st.integers(0, 7), kept=st.booleans())
@settings(max_examples=60, deadline=None)
def test_pieces_are_merged_in_their_order(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], killed: int, kept: bool
) -> None:
    folder = tmp_path_factory.mktemp("pieces") / "pieces" if kept else None
    pieces = strings(folder, 7)
    pieces.open({"a": 1})
    for number in order[:killed]:
        pieces.add(number, "abcdefg"[number])
    if folder is not None:
        pieces = strings(folder, 7)  # the process was killed here
        pieces.open({"a": 1})
    assert pieces.missing == sorted(order[killed:])
    for number in order[killed:]:
        pieces.add(number, "abcdefg"[number])
    assert pieces.result() == "abcdefg"
    if folder is not None:
        assert sorted(p.name for p in folder.iterdir()) == ["job.json", "merged-00007"]


def test_a_kill_between_two_writes_loses_and_doubles_nothing(tmp_path: Path) -> None:
    """The merged file is written before the pieces in it are deleted."""
    pieces = strings(tmp_path, 4)
    pieces.open({})
    for name, text in (("merged-00001", "a"), ("merged-00002", "ab"), ("piece-00001", "b")):
        (tmp_path / name).write_text(text)
    (tmp_path / "piece-00003").write_text("d")
    (tmp_path / ".piece-00002.0a1b.part").write_text("half of a c")
    again = strings(tmp_path, 4)
    again.open({})
    assert again.missing == [2]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "job.json",
        "merged-00002",
        "piece-00003",
    ]
    again.add(2, "c")
    assert again.result() == "abcd"


def test_a_folder_of_another_job_is_refused(tmp_path: Path) -> None:
    strings(tmp_path, 2).open({"model": "a", "tokens": [3, 5]})
    with pytest.raises(ClusterError, match=r"another job: tokens is \[3, 5\] there and \[3\] now"):
        strings(tmp_path, 2).open({"model": "a", "tokens": [3]})
    (tmp_path / "job.json").write_text("{")
    with pytest.raises(ClusterError, match=r"cannot read .*job\.json"):
        strings(tmp_path, 2).open({})


@pytest.mark.parametrize("count", [1, 2, SHARDS, SHARDS + 1, 3 * SHARDS + 7])
def test_shards_follow_from_the_prompts(count: int) -> None:
    prompts = [[n] for n in range(count)]
    shards = shards_of(prompts)
    assert [ids for shard in shards for ids in shard] == prompts
    assert len(shards) <= SHARDS
    assert len(shards) == count or count > SHARDS


# ---- analysis


@pytest.fixture(scope="module")
def whole(source: ModelSource) -> Analysis:
    return tappa.analyze(*source.load(), TEXTS)


def test_an_analysis_in_pieces_is_the_analysis(
    source: ModelSource, whole: Analysis, tmp_path: Path
) -> None:
    check_same(analyze_texts(InProcess(source), TEXTS), whole)
    check_same(analyze_texts(InProcess(source), TEXTS, folder=tmp_path / "a"), whole)
    pool = Elsewhere(source)
    check_same(analyze_texts(pool, TEXTS, folder=tmp_path / "b"), whole)
    assert pool.done == [f"shard {n}" for n in range(6, -1, -1)]


def test_an_interrupted_analysis_goes_on(
    source: ModelSource, whole: Analysis, tmp_path: Path
) -> None:
    seen: list[tuple[int, int, int, int]] = []
    with pytest.raises(KeyboardInterrupt):
        analyze_texts(
            Elsewhere(source, stop=3), TEXTS, folder=tmp_path, follow=lambda *x: seen.append(x)
        )
    assert seen == [(0, 7, 0, 0), (1, 7, 0, 0), (2, 7, 0, 0), (3, 7, 0, 0)]
    second = Elsewhere(source)
    check_same(analyze_texts(second, TEXTS, folder=tmp_path), whole)
    assert second.done == [f"shard {n}" for n in range(3, -1, -1)]  # and no other again
    third = Elsewhere(source)
    check_same(analyze_texts(third, TEXTS, folder=tmp_path), whole)
    assert third.done == []
    with pytest.raises(ClusterError, match="another job: prompts is"):
        analyze_texts(third, TEXTS[1:], folder=tmp_path)


def test_shards_that_fail_are_named_and_the_others_kept(
    source: ModelSource, whole: Analysis, tmp_path: Path
) -> None:
    pool = Elsewhere(source, broken=("shard 2", "shard 5"))
    with pytest.raises(ClusterError, match="2 pieces failed: shard 5: KeyError: 'broken'; shard 2"):
        analyze_texts(pool, TEXTS, folder=tmp_path)
    assert len(pool.retried) == 6
    again = Elsewhere(source)
    check_same(analyze_texts(again, TEXTS, folder=tmp_path), whole)
    assert again.done == ["shard 5", "shard 2"]


def test_sums_in_a_file_are_the_sums(whole: Analysis, tmp_path: Path) -> None:
    path = tmp_path / "sums"
    write_sums(whole, path)
    check_same(read_sums(path), whole)
    content = path.read_bytes()
    for damaged in (b"", content[: len(content) // 2], b"\0" * 99):
        path.write_bytes(damaged)
        with pytest.raises(AnalysisFileError, match="cannot read the sums"):
            read_sums(path)
    with pytest.raises(AnalysisFileError, match="cannot read the sums"):
        read_sums(tmp_path / "none")


def test_an_interrupted_calibration_goes_on(source: ModelSource, tmp_path: Path) -> None:
    """By workers, and then by this process; pieces that came too early are used."""
    model, tokenizer = source.load()
    windows = Windows.of(model, tokenizer, " ".join(TEXTS), window=31, stride=17)
    whole, state = calibrate_on(model, windows), tmp_path / "sums.json"
    pieces = -(-len(windows.ids) // EVERY)
    with pytest.raises(KeyboardInterrupt):
        calibrate_by(Elsewhere(source, stop=pieces - 2), model, windows, state=state)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sums.json.pieces"]
    other = Windows.of(model, tokenizer, TEXTS[0], window=31, stride=17)
    with pytest.raises(ClusterError, match="another job: calibration is"):
        calibrate_by(Elsewhere(source), model, other, state=state)
    second = Elsewhere(source)
    found = calibrate_by(second, model, windows, state=state)
    assert second.done == ["piece 1", "piece 0"]
    for name in ("cosines", "similarity", "output"):
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sums.json", "sums.json.progress"]
    third = Elsewhere(source)
    calibrate_by(third, model, windows, state=state)
    assert third.done == []


# ---- what is asked for


def test_more_gpus_than_this_machine_has(source: ModelSource) -> None:
    with (
        pytest.raises(ClusterError, match="expected 99 GPUs"),
        open_pool(source, Placement(gpus=99.0), Console(file=io.StringIO())),
    ):
        pass


@pytest.mark.parametrize("gpus", [1.5, -1.0, float("nan"), float("inf")])
def test_gpus_that_nobody_can_give(gpus: float) -> None:
    with pytest.raises(ClusterError, match="a share of one GPU or a whole number of them"):
        Placement(gpus=gpus)


def test_without_ray_it_says_so(source: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "tappa.cluster.ray_pool", raising=False)
    with (
        pytest.raises(MissingExtraError, match=r"tappa\[cluster\]"),
        open_pool(source, Placement(2), Console(file=io.StringIO())),
    ):
        pass


def test_one_worker_goes_on_where_many_began(run: Run, source: ModelSource, tmp_path: Path) -> None:
    """Without Ray; a folder without pieces stays without."""
    files = []
    for number, text in enumerate(TEXTS[:3]):
        files.append(tmp_path / f"{number}.txt")
        files[-1].write_text(text)
    texts = [part for file in files for part in ("--text", file)]
    alone, begun = tmp_path / "alone", tmp_path / "begun"
    options = ("--device", "cpu", "--no-report")
    assert run("analyze", source.name, *texts, *options, "--out", alone)[0] == 0
    assert sorted(p.name for p in alone.iterdir()) == ["analysis.json", "asked.json", "heads.csv"]
    with pytest.raises(KeyboardInterrupt):
        analyze_texts(Elsewhere(source, stop=2), TEXTS[:3], folder=begun)
    code, _, errors = run("analyze", source.name, *texts, *options, "--out", begun)
    assert (code, errors) == (0, "")
    assert sorted(p.name for p in (begun / "pieces").iterdir()) == ["job.json", "merged-00003"]
    assert (begun / "analysis.json").read_bytes() == (alone / "analysis.json").read_bytes()
    code, _, errors = run("analyze", source.name, *texts[:4], *options, "--out", begun, "--force")
    assert code == 2
    assert errors.startswith("error: ")
    assert "holds pieces of another job: prompts is" in errors


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("analyze", "--text"), ["1 prompts of at most 90 tokens, in 1 shards", "FLOP"]),
        (("eval", "--limit", "3", "--tasks", "ruler,fidelity"), ["36 samples", "unknown until"]),
    ],
)
def test_a_dry_run_does_nothing(
    run: Run, source: ModelSource, tmp_path: Path, command: tuple[str, ...], words: list[str]
) -> None:
    (tmp_path / "a.txt").write_text(TEXTS[0])
    arguments = [command[0], source.name, *command[1:]]
    if command[0] == "analyze":
        arguments.append(str(tmp_path / "a.txt"))
    out = tmp_path / "out"
    code, text, errors = run(*arguments, "--workers", 2, "--dry-run", "--out", out)
    assert (code, errors) == (0, "")
    for word in words:
        assert word in text
    assert "on 2 workers: at most" in text
    assert not out.exists()


def test_the_bar_says_what_is_tried_again() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with following(console, "analysing", "shards") as follow:
        follow(2, 5, 0, 0)
        follow(3, 5, 1, 2)
    text = out.getvalue()
    assert "3/5" in text
    assert "1 failed, 2 tried again" in text
    assert "/min" in text
