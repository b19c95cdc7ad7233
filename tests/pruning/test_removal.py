"""Removing layers and heads from tiny models, and loading them without tappa."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig

import tappa
from near_ties import watched
from tappa.errors import PruningError
from tappa.pruning import (
    Amounts,
    Plan,
    Windows,
    apply,
    calibrate_on,
    layers_removed,
    plan,
    prune,
    remove_kv_groups,
    remove_layers,
    save_checkpoint,
    silence_heads,
)
from tiny import tiny_model as make_tiny
from tiny import tiny_tokenizer

tiny_model: Any = make_tiny
KINDS = ["llama", "mistral", "qwen2", "qwen3", "gemma3"]
IDS = torch.randint(3, 90, (2, 13), generator=torch.Generator().manual_seed(0))
DEEP: dict[str, dict[str, Any]] = {
    kind: {"num_hidden_layers": 5}
    | (
        {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"] * 2}
        if kind == "gemma3"
        else {}
    )
    for kind in KINDS
}
DEEP["gemma3"]["layer_types"] = DEEP["gemma3"]["layer_types"][:5]
WIDE = {"hidden_size": 60}  # 4 heads of 10, after one of 3 groups is gone, divide it too
PLAIN = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(int(sys.argv[4]))  # as here: sums in the same order
folder, ids = sys.argv[1], torch.tensor(json.loads(sys.argv[2]))
model = AutoModelForCausalLM.from_pretrained(folder).eval()
AutoTokenizer.from_pretrained(folder)
assert not any(name.split(".")[0] == "tappa" for name in sys.modules)
with torch.inference_mode():
    logits = model(ids).logits
    text = model.generate(ids, max_new_tokens=7, do_sample=False, pad_token_id=0)
torch.save({"logits": logits, "text": text}, sys.argv[3])
"""


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.inference_mode():
        return model(ids).logits


class Skipped(nn.Module):
    """In the place of a layer: nothing happens."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.attention_type = getattr(layer, "attention_type", None)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


def plainly(folder: Path, tmp_path: Path) -> dict[str, Tensor]:
    """Logits and text from a fresh process in isolated mode, where tappa is not imported."""
    out, ids = tmp_path / "out.pt", json.dumps(IDS.tolist())
    threads = str(torch.get_num_threads())
    subprocess.run(
        [sys.executable, "-I", "-c", PLAIN, str(folder), ids, str(out), threads],
        check=True,
        cwd=tmp_path,
        capture_output=True,
    )
    return torch.load(out, weights_only=True)


# ---- layers


@pytest.mark.parametrize("kind", KINDS)
def test_a_removed_layer_is_a_skipped_one(kind: str) -> None:
    model, other = tiny_model(kind, **DEEP[kind]), tiny_model(kind, **DEEP[kind])
    for layer in (1, 3):
        other.model.layers[layer] = Skipped(other.model.layers[layer])
    remove_layers(model, [3, 1])
    assert len(model.model.layers) == model.config.num_hidden_layers == 3
    torch.testing.assert_close(logits(model), logits(other))
    indices = [m.layer_idx for m in model.modules() if hasattr(m, "layer_idx")]
    assert sorted(set(indices)) == [0, 1, 2]
    if kind == "gemma3":
        kept = [DEEP[kind]["layer_types"][i] for i in (0, 2, 4)]
        assert model.config.layer_types == kept


@pytest.mark.parametrize("kind", KINDS)
def test_a_pruned_model_writes_with_a_cache_what_it_writes_without(kind: str) -> None:
    model: Any = remove_layers(tiny_model(kind, **DEEP[kind]), [0, 2])
    options: dict[str, Any] = {"max_new_tokens": 11, "do_sample": False, "pad_token_id": 0}
    with watched(model) as seen:
        cached = model.generate(IDS, **options)
    seen.check_text(model.generate(IDS, use_cache=False, **options), cached, least=1)


@pytest.mark.same_kernel
@pytest.mark.parametrize("kind", KINDS)
def test_plain_transformers_loads_it(kind: str, tmp_path: Path) -> None:
    model: Any = remove_layers(tiny_model(kind, **DEEP[kind]), [1, 2])
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "pruned")
    found = plainly(tmp_path / "pruned", tmp_path)
    torch.testing.assert_close(found["logits"], logits(model), atol=0, rtol=0)
    text = model.generate(IDS, max_new_tokens=7, do_sample=False, pad_token_id=0)
    assert found["text"].tolist() == text.tolist()


def test_removing_none_is_the_identity_and_one_layer_still_runs() -> None:
    model = tiny_model("llama", num_hidden_layers=5)
    before = logits(model)
    assert logits(remove_layers(model, [])).equal(before)
    remove_layers(model, [0, 1, 3, 4])
    assert logits(model).shape == before.shape
    assert logits(model).isfinite().all()


@pytest.mark.parametrize(
    ("removed", "words"),
    [
        ([0, 1, 2, 3, 4], "cannot remove all 5 layers"),
        ([5], "layers from 0 to 4, got 5"),
        ([-1], "layers from 0 to 4, got -1"),
        ([1, 1], "each layer once"),
    ],
)
def test_layers_that_cannot_be_removed(removed: list[int], words: str) -> None:
    model = tiny_model("llama", num_hidden_layers=5)
    before = logits(model)
    with pytest.raises(PruningError, match=words):
        remove_layers(model, removed)
    assert logits(model).equal(before)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_layers_are_put_back(kind: str) -> None:
    model = tiny_model(kind, **DEEP[kind])
    before, config = logits(model), model.config.to_dict()
    with layers_removed(model, [1, 4]):
        gone = logits(model)
    assert not torch.allclose(gone, before)
    torch.testing.assert_close(gone, logits(remove_layers(tiny_model(kind, **DEEP[kind]), [1, 4])))
    with pytest.raises(KeyboardInterrupt), layers_removed(model, [0]):
        raise KeyboardInterrupt
    assert logits(model).equal(before)
    assert model.config.to_dict() == config


def test_what_a_plain_config_cannot_say_is_refused() -> None:
    """Layers of different widths: the config knows one width for all."""
    model = tiny_model("llama", num_hidden_layers=3)
    model.model.layers[2].mlp.up_proj = nn.Linear(42, 7)
    before = model.config.to_dict()
    with pytest.raises(PruningError, match=r"cannot hold this: model.layers.1.mlp.up_proj"):
        remove_layers(model, [1])
    assert model.config.to_dict() == before
    assert len(model.model.layers) == 3


# ---- heads


@pytest.mark.parametrize("kind", KINDS)
def test_a_silenced_head_adds_nothing(kind: str) -> None:
    """As if the head's output were 0 before o_proj."""
    model, other = tiny_model(kind), tiny_model(kind)
    projection = other.model.layers[1].self_attn.o_proj
    heads, width = other.config.num_attention_heads, other.model.layers[1].self_attn.head_dim

    def silence(module: nn.Module, args: tuple) -> tuple:
        x = args[0].unflatten(-1, (heads, width)).clone()
        x[..., [2, 5], :] = 0
        return (x.flatten(-2),)

    projection.register_forward_pre_hook(silence)
    silence_heads(model, [(1, 5), (1, 2)])
    torch.testing.assert_close(logits(model), logits(other))
    assert not torch.allclose(logits(model), logits(tiny_model(kind)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_sliced_group_is_a_silenced_one(kind: str, tmp_path: Path) -> None:
    model, other = tiny_model(kind, **WIDE), tiny_model(kind, **WIDE)
    layers = len(model.model.layers)
    groups = [(layer, (layer + 1) % 3) for layer in range(layers)]
    remove_kv_groups(model, groups)
    silence_heads(other, [(la, 2 * g + i) for la, g in groups for i in range(2)])
    torch.testing.assert_close(logits(model), logits(other), atol=1e-5, rtol=1e-5)
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (4, 2)
    saved = save_checkpoint(model, tiny_tokenizer(), tmp_path / "pruned")
    found = plainly(saved, tmp_path)
    torch.testing.assert_close(found["logits"], logits(model), atol=0, rtol=0)
    text = model.generate(IDS, max_new_tokens=7, do_sample=False, pad_token_id=0)
    assert found["text"].tolist() == text.tolist()
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in other.parameters())


def test_groups_that_cannot_be_sliced() -> None:
    model = tiny_model("llama", **WIDE)
    before = logits(model)
    for groups, words in (
        ([(0, 1)], "lose from 0 to 1: remove the same number in every layer"),
        ([(0, 1), (0, 2), (1, 0)], "lose from 1 to 2"),
        ([(la, g) for la in range(2) for g in range(3)], "cannot remove all 3 KV heads"),
        ([(0, 3), (1, 0)], "KV heads from 0 to 2, got layer 0, head 3"),
        ([(2, 0)], "layers from 0 to 1"),
        ([(0, 0), (0, 0)], "once"),
    ):
        with pytest.raises(PruningError, match=words):
            remove_kv_groups(model, groups)
    with pytest.raises(PruningError, match=r"q_proj as a linear layer.*Phi3Attention"):
        remove_kv_groups(tiny_model("phi3"), [(0, 0), (1, 0)])
    with pytest.raises(PruningError, match="query heads from 0 to 5"):
        silence_heads(model, [(0, 6)])
    assert logits(model).equal(before)


def _refuses() -> bool:
    """Whether this transformers wants the hidden size to be a multiple of the heads."""
    try:
        LlamaConfig(hidden_size=42, num_attention_heads=4, head_dim=10)
    except Exception:
        return True
    return False


@pytest.mark.skipif(not _refuses(), reason="this transformers takes any number of heads")
def test_a_config_that_refuses_the_new_number_of_heads_is_an_error_of_one_line() -> None:
    """42 is no multiple of 4 heads."""
    model = tiny_model("llama")
    before = logits(model)
    with pytest.raises(PruningError, match=r"LlamaConfig refuses|cannot build") as caught:
        remove_kv_groups(model, [(0, 0), (1, 0)])
    assert "\n" not in str(caught.value)
    assert logits(model).equal(before)


# ---- plans


def test_prune_removes_what_the_plan_says() -> None:
    model = tiny_model("llama", num_hidden_layers=5, **WIDE)
    windows = Windows.of(model, tiny_tokenizer(), "A truth universally. " * 9, window=31)
    calibration = calibrate_on(model, windows)
    amounts = Amounts(layers=2, kv_groups=1, query_heads=7, order="bi")
    wanted = plan(model, calibration, amounts)
    assert wanted.layers == list(calibration.block_influence.argsort(kind="stable")[:2])
    assert len(set(wanted.query_heads)) == 7
    assert [layer for layer, _ in wanted.kv_groups] == [0, 1, 2, 3, 4]
    other = apply(tiny_model("llama", num_hidden_layers=5, **WIDE), wanted)
    prune(model, calibration, layers=2, kv_groups=1, query_heads=7, order="bi")
    assert logits(model).equal(logits(other))
    assert (len(model.model.layers), model.config.num_key_value_heads) == (3, 2)
    with pytest.raises(PruningError, match="another model: layers is 5 there and 3 here"):
        plan(model, calibration, Amounts(layers=1))


def test_an_analysis_knows_q_similarity() -> None:
    model = tiny_model("llama", num_hidden_layers=5, **WIDE)
    analysis = tappa.analyze(model, tiny_tokenizer(), "A truth universally acknowledged. " * 3)
    means = analysis.to_frame().groupby("layer")["q_similarity"].mean()
    wanted = plan(model, analysis, Amounts(layers=2, order="q_similarity"))
    assert wanted.layers == list(means.sort_values(ascending=False).index[:2])
    heads = plan(model, analysis, Amounts(query_heads=1, importance="dissimilarity")).query_heads
    best = analysis.to_frame().sort_values("q_similarity").iloc[-1]
    assert heads == [(best["layer"], best["head"])]
    with pytest.raises(PruningError, match="no block influence, which the order bi needs"):
        plan(model, analysis, Amounts(layers=2))
    with pytest.raises(PruningError, match="no outputs of heads"):
        prune(model, analysis, kv_groups=1)


def test_greedy_measures_the_model_itself() -> None:
    model = tiny_model("llama", num_hidden_layers=4)
    windows = Windows.of(model, tiny_tokenizer(), "A truth universally. " * 9, window=31, limit=2)
    calibration = calibrate_on(model, windows)
    before = logits(model)
    calls = list[tuple[int, int]]()
    wanted = plan(
        *(model, calibration, Amounts(layers=1, order="greedy"), windows),
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert logits(model).equal(before)
    losses = {}
    for layer in range(4):
        with layers_removed(model, [layer]):
            rows = [logits(model, torch.tensor([ids]))[0].log_softmax(-1) for ids in windows.ids]
        nll = [-r[range(len(i) - 1), i[1:]].mean() for r, i in zip(rows, windows.ids, strict=True)]
        losses[layer] = float(sum(nll))
    assert wanted.layers == [min(losses, key=losses.__getitem__)]
    with pytest.raises(PruningError, match="greedy needs windows"):
        plan(model, calibration, Amounts(layers=1, order="greedy"))


def test_a_share_of_layers_goes_in_the_default_order() -> None:
    model = tiny_model("llama", num_hidden_layers=7)
    windows = Windows.of(model, tiny_tokenizer(), "A truth universally. " * 9, window=31, limit=2)
    calibration = calibrate_on(model, windows)
    least = calibration.block_influence.argsort(kind="stable").tolist()
    assert plan(model, calibration, Amounts(layers=3)).layers == least[:3]
    share = plan(model, calibration, Amounts(layers=0.43))  # 3.01 layers
    assert (share.layers, share.settings["layers"], share.settings["order"]) == (least[:3], 3, "bi")
    assert len(prune(model, calibration, layers=0.43).model.layers) == 4


@pytest.mark.parametrize("trained", [True, False])
def test_what_is_left_is_as_trainable_as_before(trained: bool) -> None:
    model = tiny_model("qwen2", num_hidden_layers=3, **WIDE).requires_grad_(trained)
    model.model.embed_tokens.requires_grad_(not trained)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    groups = [(layer, 1) for layer in range(3)]
    apply(model, Plan(layers=[2], query_heads=[(0, 1)], kv_groups=groups))
    after = {name: p.requires_grad for name, p in model.named_parameters()}
    assert after == {name: before[name] for name in after}
    assert {trained, not trained} == set(after.values())


def test_the_training_in_the_docs_lowers_the_loss() -> None:
    text = (Path(__file__).parents[2] / "docs" / "pruning.md").read_text(encoding="utf-8")
    example = next(part for part in text.split("```python\n")[1:] if "AdamW" in part)
    model, tokenizer = tiny_model("llama", num_hidden_layers=3, **WIDE), tiny_tokenizer()
    model.requires_grad_(False)  # as tappa.load gives it
    sentence = "It is a truth universally acknowledged, that a man wants a wife. "
    calibration = tappa.calibrate(model, tokenizer, sentence, window=31)
    prune(model, calibration, layers=1, kv_groups=1)
    ids = tokenizer(sentence, return_tensors="pt").input_ids
    losses = [model(ids, labels=ids).loss.item()]
    for steps in (1, 3):
        code = example.split("```")[0].replace("range(3)", f"range({steps})")
        exec(code, {"model": model, "tokenizer": tokenizer, "text": sentence})
        losses.append(model(ids, labels=ids).loss.item())
    assert losses[0] > losses[1] > losses[2]
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("amounts", "words"),
    [
        ({"layers": 2}, "cannot remove 2 of 2 layers"),
        ({"layers": -3}, "got -3"),
        ({"order": "grady"}, "did you mean 'greedy'"),
        ({"query_heads": 12}, "cannot remove 12 of 12 query heads"),
        ({"kv_groups": 3}, "cannot remove 3 of 3 KV heads"),
        ({"kv_groups": -1}, "from 0 on, got -1"),
        ({"beta": float("nan")}, "beta as a number from 0 on, got nan"),
    ],
)
def test_amounts_that_cannot_be(amounts: dict[str, Any], words: str) -> None:
    with pytest.raises(PruningError, match=words):
        Amounts(**amounts).check(tiny_model("llama"))


def test_joined_projections_keep_their_kv_heads() -> None:
    with pytest.raises(PruningError, match="expected q_proj as a linear layer of its own"):
        Amounts(kv_groups=1).check(tiny_model("gpt_neox"))


def test_an_empty_plan_changes_nothing() -> None:
    model = tiny_model("qwen3")
    before = logits(model)
    assert logits(apply(model, Plan())).equal(before)
