"""`tappa verify` as users run it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tappa.verification.bounds import BoundResult
from tappa.verification.pictures import figures
from tappa.verification.presentation import to_markdown
from tappa.verification.relocation import Relocation
from tappa.verification.results import Verified
from tappa.verification.verify import kinds_of_text
from tiny import save_tiny

TEXT = "It is a truth universally acknowledged, that a single man in possession of a fortune. " * 9
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def files(tmp_path: Path) -> list[object]:
    model = save_tiny(tmp_path / "model", num_hidden_layers=3)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    return [model, "--text", text, "--tokens", 150, "--device", "cpu"]


def test_all_claims_on_a_tiny_model(run: Run, files: list[object], tmp_path: Path) -> None:
    """Of a random model no channel rules a head: bounds hold, relocations may fail."""
    out = tmp_path / "out"
    code, stdout, _ = run("verify", *files, "--prompts", 1, "--targets", "0,1", "--out", out)
    content = json.loads((out / "verification.json").read_text())
    assert code == (0 if content["passed"] else 1)
    assert {x["violations"] for x in content["bounds"]} == {0}
    assert len(content["bounds"]) == 8
    assert len(content["constructed"]) == 45
    assert {x["grain"] for x in content["sensitivity"]} == {"layers", "KV heads"}
    assert {x["base_factor"] for x in content["relocations"]} == {1.0, 0.1, 10.0}
    for words in ("Proposition 4.1", "Made-up heads", "Who needs tokens", "error"):
        assert words in stdout
    assert (out / "bounds.png").read_bytes().startswith(b"\x89PNG")


def test_json_and_a_part_of_the_claims(run: Run, files: list[object], tmp_path: Path) -> None:
    code, out, _ = run("verify", *files, "--claims", "bounds", "--json")
    found = json.loads(out)
    assert (code, found["passed"], found["relocations"]) == (0, True, [])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "text.txt"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--claims", "bound"], "did you mean 'bounds'"),
        (["--claims", ""], "at least one claim"),
        (["--head", "5"], "layer.head, such as 18.5"),
        (["--claims", "relocation", "--head", "9.0"], "layer from 0 to 2, got 9"),
        (["--claims", "relocation", "--head", "1.7"], "head from 0 to 5, got 7"),
        (["--claims", "relocation", "--targets", "99"], "channel from 0 to 4, got 99"),
        (["--targets", "x"], "channels as whole numbers"),
        (["--tokens", "20"], "at least 64 tokens"),
        (["--out", "/proc/none/x"], "cannot write"),
    ],
)
def test_bad_input_is_one_line(
    run: Run, files: list[object], options: list[object], words: str, as_users_run_it: None
) -> None:
    code, out, errors = run("verify", *files, *options)
    assert (code, out) == (2, "")
    assert words in errors
    assert errors.count("\n") == 1


def test_a_model_without_rope(run: Run, tmp_path: Path) -> None:
    code, _, errors = run("verify", save_tiny(tmp_path / "gpt2", "gpt2"), "--device", "cpu")
    assert (code, "RoPE" in errors) == (2, True)


MODEL = {"name": "m", "class": "M", "layers": 1, "heads": 1}
GOOD = Relocation(0, 0, 9, 2, 1.0, 10.0, 10.05, 10.2, 0.0, "pass")


def test_verdicts() -> None:
    """Untestable is never a failure, and never a pass either."""
    untestable = replace(GOOD, measured=None, verdict="untestable", reason="does not fit")
    assert GOOD.error == pytest.approx(0.005)
    assert untestable.error is None
    assert Verified(MODEL, 64, relocations=[GOOD, untestable]).passed
    bad = replace(GOOD, measured=11.0, verdict="fail")
    assert not Verified(MODEL, 64, relocations=[GOOD, bad]).passed
    assert not Verified(MODEL, 64, bounds=[BoundResult("jump", 5, 1, 2.0)]).passed
    nothing = BoundResult("seasonal", 0, 0, float("nan"))
    assert nothing.verdict == "untestable"
    text = to_markdown(Verified(MODEL, 64, [nothing], [untestable, bad]))
    assert "untestable (does not fit)" in text
    assert "something FAILED" in text
    assert json.loads(Verified(MODEL, 64, [nothing]).to_json())["bounds"][0]["tightness"] is None
    assert set(figures(Verified(MODEL, 64, relocations=[untestable]))) == set()
    assert set(figures(Verified(MODEL, 64, relocations=[GOOD]))) == {"relocation.png"}


def test_five_kinds_of_text() -> None:
    texts = kinds_of_text()
    assert list(texts) == ["prose", "verse", "manual", "code", "table"]
    assert min(map(len, texts.values())) > 18_000
