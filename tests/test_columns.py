"""The order of heads.csv, and the docs that list it."""

import json
import re
from pathlib import Path

import pytest

from tappa import Analysis, analyze
from tappa.columns import COLUMNS, GROUPS, TERMS, in_order, value_of
from tappa.wording import did_you_mean
from tiny import tiny_model, tiny_tokenizer

TEXT = "It is a truth universally acknowledged, that a single man in possession of a fortune. "
DOCS = Path(__file__).parents[1] / "docs" / "analysis-file.md"


@pytest.fixture(scope="module")
def found() -> Analysis:
    return analyze(tiny_model("qwen2"), tiny_tokenizer(), TEXT, tokens=53)


def test_a_table_has_the_columns_in_the_order_of_the_groups(found: Analysis) -> None:
    frame = found.to_frame()
    assert list(frame.columns) == [c.name for group in GROUPS.values() for c in group]
    assert len(set(frame.columns)) == len(COLUMNS) == 70
    assert list(frame.columns[:3]) == ["layer", "head", "kv_head"]
    assert list(frame.columns[3:13]) == [
        *("observed", "explained", "q_similarity", "k_similarity", "predictability"),
        *("vertical", "diagonal", "sink_mass", "dominant_channel", "measured_period"),
    ]
    assert list(GROUPS)[:2] == ["identity", "the ten that matter"]


def test_columns_that_nobody_knows_come_last() -> None:
    assert in_order(["new", "sink_mass", "older", "head", "layer"]) == [
        *("layer", "head", "sink_mass", "new", "older"),
    ]


def test_a_value_is_found_in_scores_too(found: Analysis) -> None:
    head = found.heads[7]
    row = found.to_frame().iloc[7]
    for column in ("head", "observed", "sink_mass", "explained_scores_re-access"):
        assert value_of(head, column) == row[column]
    assert value_of({"observed_scores": None}, "observed_scores_periodic") is None
    assert value_of({}, "sink_mass") is None


def test_a_file_with_its_heads_in_another_order_is_read(found: Analysis, tmp_path: Path) -> None:
    path = found.save(tmp_path / "a.json")
    raw = json.loads(path.read_text())
    raw["heads"] = [dict(reversed(head.items())) for head in raw["heads"]]
    path.write_text(json.dumps(raw))
    assert Analysis.load(path).to_frame().equals(found.to_frame())


def test_docs_list_the_columns_in_their_order() -> None:
    part = DOCS.read_text("utf-8").partition("## heads.csv")[2].partition("\n## ")[0]
    assert [x.lower() for x in re.findall(r"^\*\*(.+)\*\*$", part, re.M)] == [
        group.lower() for group in GROUPS
    ]
    rows = re.findall(r"^\| `([^`]+)` \| (.+) \|$", part, re.M)
    assert rows == [(column.name, column.meaning) for column in COLUMNS.values()]


def test_every_meaning_is_one_short_sentence() -> None:
    for column in COLUMNS.values():
        assert column.meaning.endswith(".")
        assert len(column.meaning) <= 160
    assert set(TERMS.values()) <= COLUMNS.keys()


def test_a_near_name_is_offered() -> None:
    assert did_you_mean("sink_mas", COLUMNS) == "; did you mean 'sink_mass'?"
    assert did_you_mean("zzz", COLUMNS) == ""
