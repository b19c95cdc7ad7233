"""A folder of results that is asked for more, for less, or for something else."""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tappa.files
from tappa.compression import methods
from tappa.errors import EvaluationError, OutputError
from tappa.evaluation.evaluate import Evaluation, Results, describe_outcome, evaluate
from tappa.evaluation.store import missing_cells, read_grid
from tappa.evaluation.suites import Source
from tappa.files import write_atomic
from tappa.models import LoadedModel
from tappa.texts import packaged_text
from tiny import tiny_model, tiny_tokenizer

FEW = Evaluation(
    methods=("full", "snapkv"),
    budgets=(40,),
    tasks=("fidelity", "choice_arithmetic"),
    source=Source(limit=2, lengths=(160,)),
)
MORE = Evaluation(
    methods=("h2o", "full", "snapkv", "cake"),
    budgets=(48, 40),
    tasks=("fidelity", "perplexity", "choice_arithmetic"),
    source=Source(limit=3, lengths=(160,)),
)


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return LoadedModel(tiny_model("llama", num_hidden_layers=1), tiny_tokenizer())


def run(tiny: LoadedModel, wanted: Evaluation, folder: Path, **options: Any) -> Results:
    return evaluate(tiny.model, tiny.tokenizer, wanted, folder, name="tiny", **options)


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        f"{path.parent.name}/{path.name}": path.read_bytes()
        for path in sorted((folder / "samples").glob("*/*"))
    }


def answers_of(content: bytes) -> dict[tuple[str, float | None], dict[str, Any]]:
    return {(one["method"], one["budget"]): one for one in json.loads(content)["answers"]}


def check_same(mine: Path, theirs: Path) -> None:
    """The same answers to the same samples, each once, but for sums in another order."""
    found, wanted = files_of(mine), files_of(theirs)
    assert found.keys() == wanted.keys()
    for name, content in wanted.items():
        mine_by_cell, theirs_by_cell = answers_of(found[name]), answers_of(content)
        assert mine_by_cell.keys() == theirs_by_cell.keys()
        assert len(json.loads(found[name])["answers"]) == len(theirs_by_cell)
        for cell, answer in theirs_by_cell.items():
            kinds = ("kl", "nll", "attention_error")  # what no near tie can turn
            for kind in kinds & answer["scores"].keys():
                other = mine_by_cell[cell]["scores"][kind]
                assert other == pytest.approx(answer["scores"][kind], abs=1e-4)
            assert mine_by_cell[cell]["tokens_held"] == answer["tokens_held"]


@pytest.fixture(scope="module")
def few(tiny: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("few")
    run(tiny, FEW, folder)
    return folder


@pytest.fixture(scope="module")
def more(tiny: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("more")
    run(tiny, MORE, folder)
    return folder


@pytest.fixture
def begun(few: Path, tmp_path: Path) -> Path:
    """A copy of the folder with few answers."""
    import shutil

    return Path(shutil.copytree(few, tmp_path / "begun"))


# ---- more and less


def test_more_of_everything_keeps_what_is_there(tiny: LoadedModel, begun: Path, more: Path) -> None:
    before = files_of(begun)
    results = run(tiny, MORE, begun)
    check_same(begun, more)
    for name, content in before.items():
        old, new = answers_of(content), answers_of(files_of(begun)[name])
        assert {cell: new[cell] for cell in old} == old
    outcome = results.outcome
    assert (outcome.answered, outcome.added, outcome.found) == (9, 4, 0)
    assert "4 of those answered had some of the answers" in describe_outcome(outcome)
    again = run(tiny, MORE, begun)
    assert (again.outcome.answered, again.outcome.found) == (0, 9)
    assert again.markdown == results.markdown
    methods_in_order = list(dict.fromkeys(row.method for row in results.tables[0].rows))
    assert methods_in_order == ["h2o", "full", "snapkv", "cake"]


@pytest.mark.parametrize(
    "change",
    [
        {"source": Source(limit=3, lengths=(160,))},
        {"budgets": (40, 48)},
        {"budgets": (48,)},
        {"methods": ("full", "cake")},
        {"tasks": ("perplexity",)},
        {"half": "report"},
    ],
    ids=lambda change: "-".join(change),
)
def test_one_thing_at_a_time(tiny: LoadedModel, begun: Path, change: dict[str, Any]) -> None:
    wanted = replace(FEW, **change)
    results = run(tiny, wanted, begun)
    budgets = {row.budget for table in results.tables for row in table.rows} - {None}
    assert budgets == set(wanted.budgets)
    assert {row.method for table in results.tables for row in table.rows} == set(wanted.methods)
    names = {table.name for table in results.tables}
    assert names >= set(wanted.tasks)


def test_less_is_tabled_and_the_rest_stays(tiny: LoadedModel, more: Path) -> None:
    before = files_of(more)
    wanted = replace(MORE, methods=("full", "snapkv"), source=Source(limit=1, lengths=(160,)))
    results = run(tiny, wanted, more)
    assert files_of(more) == before
    assert results.outcome.answered == 0
    for table in results.tables:
        assert {row.n for row in table.rows} == {1}
        assert {row.method for row in table.rows} == {"full", "snapkv"}
    assert "h2o" not in (more / "tables.md").read_text()
    assert len(run(tiny, MORE, more).tables) == 3


def test_the_folder_tells_what_was_asked_and_how(tiny: LoadedModel, begun: Path) -> None:
    run(tiny, MORE, begun)
    run(tiny, MORE, begun)
    known = read_grid(begun)
    assert known is not None
    assert known["asked"]["methods"] == list(MORE.methods)
    assert set(known["tasks"]) == {"fidelity", "choice_arithmetic", "perplexity"}
    assert [entry["asked"]["limit"] for entry in known["later"]] == [3]  # a repeat says nothing
    assert known["run"]["versions"]["torch"] == torch.__version__


def test_shards_that_are_asked_for_more(tiny: LoadedModel, begun: Path, more: Path) -> None:
    left = run(tiny, MORE, begun, shard=(1, 2))
    assert left.outcome.answered == 4
    assert all(row.n <= 3 for table in left.tables for row in table.rows)
    run(tiny, MORE, begun, shard=(0, 2))
    check_same(begun, more)


def test_a_run_that_died_while_it_added(tiny: LoadedModel, begun: Path, more: Path) -> None:
    class Died(BaseException):
        pass

    def die(done: int, total: int) -> None:
        if done == 3:
            raise Died

    with pytest.raises(Died):
        run(tiny, MORE, begun, progress=die)
    before = files_of(begun)
    results = run(tiny, MORE, begun)
    assert (results.outcome.answered, results.outcome.found) == (6, 3)
    check_same(begun, more)
    finished = [name for name, content in before.items() if len(answers_of(content)) == 7]
    assert len(finished) == 3
    assert all(files_of(begun)[name] == before[name] for name in finished)


def test_two_runs_of_other_methods_at_once(tiny: LoadedModel, begun: Path) -> None:
    """One begins, another adds to the same files: neither loses what the other wrote."""

    def other(done: int, total: int) -> None:
        if done == 0:
            run(tiny, replace(FEW, methods=("full", "h2o")), begun)

    run(tiny, replace(FEW, methods=("full", "cake")), begun, progress=other)
    for content in files_of(begun).values():
        assert {method for method, _ in answers_of(content)} == {"full", "snapkv", "h2o", "cake"}


# ---- what an answer means


def test_a_method_is_its_options(tiny: LoadedModel, begun: Path) -> None:
    assert methods.spelled_out("snapkv(kernel=7)") == "snapkv(window=32,kernel=7)"
    assert methods.spelled_out("cake(gamma=50.0)") == methods.spelled_out("cake(gamma=5e1)")
    assert methods.spelled_out("h2o+cake").startswith("h2o(window=32)+cake(window=32,")
    spelled = run(tiny, replace(FEW, methods=("full", "snapkv(kernel=5)")), begun)
    assert spelled.outcome.answered == 0
    assert "| snapkv(kernel=5) |" in spelled.markdown
    other = run(tiny, replace(FEW, methods=("full", "snapkv(kernel=7)")), begun)
    assert other.outcome.answered == 4


def test_a_new_default_is_another_method(
    tiny: LoadedModel, begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def snapkv(window: int = 32, kernel: int = 11) -> methods.Method:
        return methods.adakv(window, kernel)

    monkeypatch.setitem(methods.METHODS, "snapkv", snapkv)
    assert run(tiny, FEW, begun).outcome.added == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "results of another grid: seed is 0 there and 1 now"),
        ({"chat": True}, "results of another grid: chat is False there and True now"),
        ({"lengths": (144,)}, r"another prompt: for fidelity lengths is \[160\] there and \[144\]"),
    ],
)
def test_another_seed_template_or_length_is_refused(
    tiny: LoadedModel, begun: Path, change: dict[str, Any], words: str
) -> None:
    before = files_of(begun), (begun / "grid.json").read_bytes()
    with pytest.raises(EvaluationError, match=words) as caught:
        run(tiny, replace(FEW, source=replace(FEW.source, **change)), begun)
    assert "\n" not in str(caught.value)
    assert (files_of(begun), (begun / "grid.json").read_bytes()) == before


def test_another_model_dtype_or_text_is_refused(
    tiny: LoadedModel, begun: Path, tmp_path: Path
) -> None:
    def refused(model: Any, wanted: Evaluation = FEW, name: str = "tiny") -> str:
        with pytest.raises(EvaluationError) as caught:
            evaluate(model, tiny.tokenizer, wanted, begun, name=name)
        return str(caught.value)

    other = tiny_model("llama", num_hidden_layers=1)
    assert evaluate(other, tiny.tokenizer, FEW, begun, name="moved").outcome.found == 4
    other.lm_head.weight.data += 0.1
    assert "another grid: weights is '" in refused(other)
    assert "another grid: model is 'tiny' there and 'b' now" in refused(other, name="b")
    half = tiny_model("llama", num_hidden_layers=1).double()
    assert "dtype is 'float32' there and 'float64' now" in refused(half)
    slower = tiny_model("llama", num_hidden_layers=1)
    slower.config.rope_parameters["rope_theta"] = 500.0
    assert "rope is {" in refused(slower)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text(packaged_text()[5000:15000])
    text = replace(FEW, source=replace(FEW.source, data=tmp_path / "data"))
    assert "for fidelity data is None there and '" in refused(tiny.model, text)


def test_a_task_of_other_data_or_lengths_comes_beside(tiny: LoadedModel, begun: Path) -> None:
    results = run(tiny, replace(FEW, tasks=("fidelity_144", "fidelity")), begun)
    assert (results.outcome.answered, results.outcome.found) == (2, 2)
    source = replace(FEW.source, lengths=(99,))
    assert run(tiny, replace(FEW, tasks=("perplexity",), source=source), begun).outcome.answered


# ---- folders of earlier versions


@pytest.fixture
def old(begun: Path) -> Path:
    """As versions before wrote them: all in the identity, no method spelled out."""
    known = json.loads((begun / "grid.json").read_text())
    identity = {name: known["identity"][name] for name in ("model", "weights", "dtype")}
    asked = known["asked"]
    identity |= {name: asked[name] for name in ("methods", "budgets", "tasks", "half")}
    source = {name: asked[name] for name in ("limit", "lengths", "data")}
    identity["source"] = source | {"seed": 0, "chat": False}
    content = {"schema": 1, "identity": identity, "run": known["run"]}
    (begun / "grid.json").write_text(json.dumps(content))
    for path in (begun / "samples").glob("*/*.json"):
        record = json.loads(path.read_text())
        for answer in record["answers"]:
            del answer["spelled"], answer["compress_seconds"]
        path.write_text(json.dumps(record))
    return begun


def test_an_old_folder_goes_on(tiny: LoadedModel, old: Path, more: Path) -> None:
    assert run(tiny, FEW, old).outcome.found == 4
    run(tiny, MORE, old)
    check_same(old, more)


def test_an_old_folder_of_another_grid(tiny: LoadedModel, old: Path) -> None:
    with pytest.raises(EvaluationError, match="seed is 0 there and 2 now"):
        run(tiny, replace(FEW, source=replace(FEW.source, seed=2)), old)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"schema": 99}', b'{"schema": 1', None])
def test_answers_without_a_description_are_refused(
    tiny: LoadedModel, begun: Path, content: bytes | None
) -> None:
    path = begun / "grid.json"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(EvaluationError, match=r"grid\.json, which is missing, damaged"):
        run(tiny, FEW, begun)


# ---- damage and full disks


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: bytes(len(content)),
        lambda content: b"\xff\xfe" + content,
        lambda content: b"[]",
        lambda content: content.replace(b'"schema": 1', b'"schema": 99'),
        lambda content: content.replace(b'"answers"', b'"others"'),
        lambda content: content.replace(b'"scores"', b'"others"'),
    ],
)
def test_a_damaged_file_is_set_aside(tiny: LoadedModel, begun: Path, damage: Any) -> None:
    before = files_of(begun)
    path = begun / "samples" / "fidelity" / "00001.json"
    path.write_bytes(damage(path.read_bytes()))
    damaged, said = path.read_bytes(), list[str]()
    results = run(tiny, FEW, begun, say=said.append)
    assert said == [f"{path} is damaged: now 00001.json.damaged, its sample is answered again"]
    assert (results.outcome.answered, results.outcome.found) == (1, 3)
    after = files_of(begun)
    assert after.pop("fidelity/00001.json.damaged") == damaged
    assert answers_of(after.pop("fidelity/00001.json")).keys() == {("full", None), ("snapkv", 40)}
    assert after == {name: before[name] for name in after}
    assert {row.n for table in results.tables for row in table.rows} == {2}


def test_damaged_task_files_are_made_again(tiny: LoadedModel, begun: Path) -> None:
    folder = begun / "tasks" / "choice"
    run(tiny, FEW, begun)  # a copy: its task files were those of the other folder
    assert str(begun) in (folder / "choice_arithmetic.yaml").read_text()
    for name in ("choice_arithmetic.made.json", "choice_arithmetic.jsonl"):
        path = folder / name
        before = path.read_bytes()
        path.write_bytes(before[: len(before) // 2])
        assert run(tiny, FEW, begun).outcome.found == 4
        assert path.read_bytes() == before


@pytest.mark.parametrize("room", [0, 1, 2, 5, 9, 10])
def test_a_full_disk_leaves_nothing_half_written(
    tiny: LoadedModel, more: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """Of so many files; the one after them does not fit."""
    written: list[int] = []

    def fsync(number: int) -> None:
        if len(written) >= room:
            raise OSError(28, "No space left on device")
        written.append(number)

    folder = tmp_path / "a" / "results"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OutputError, match="no space left on device"):
            run(tiny, MORE, folder)
    assert (tmp_path / "a").exists() == (room > 0)
    for here, folders, files in os.walk(tmp_path):
        assert here == str(tmp_path) or folders or files
        assert not [name for name in files if name.endswith(".part")]
    run(tiny, MORE, folder)
    check_same(folder, more)


def test_a_damaged_file_that_cannot_be_renamed(
    tiny: LoadedModel, begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (begun / "samples" / "fidelity" / "00001.json").write_text("")

    def fail(*others: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "replace", fail)

    class Name:
        task, number, digest = "fidelity", 1, ""

    with pytest.raises(EvaluationError, match=r"cannot set the damaged file .* Permission denied"):
        missing_cells(begun, [Name()], FEW.cells(), lambda text: None)


def test_a_folder_that_was_there_stays(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(OutputError), tappa.files.made_folder(tmp_path / "mine" / "new" / "deep"):
        write_atomic(tmp_path / "none" / "x", "")
    assert list(tmp_path.iterdir()) == [tmp_path / "mine"]
    assert not list((tmp_path / "mine").iterdir())
