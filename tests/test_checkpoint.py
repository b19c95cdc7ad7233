"""Folders that load() must refuse."""

import pytest
from transformers import T5Config, ViTConfig

from loading import refusal
from tappa.models import load
from tiny import change_config, save_tiny, tiny_model


@pytest.fixture
def folder(tmp_path):
    return save_tiny(tmp_path / "llama")


def test_a_folder_without_config(folder):
    (folder / "config.json").unlink()
    assert "expected a model folder with a config.json" in refusal(folder)


@pytest.mark.parametrize("content", ["{", "", "[]", '{"model_type": 5}', '{"model_type": "quux"}'])
def test_a_corrupt_config(folder, content):
    (folder / "config.json").write_text(content)
    assert f"cannot read the config of {folder}" in refusal(folder)


def test_a_pickle_is_never_opened(folder):
    (folder / "model.safetensors").unlink()
    assert refusal(folder).endswith("got none")
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    assert "only pytorch_model.bin, a pickle, which is never opened" in refusal(folder)


@pytest.mark.parametrize("size", [0, 4, 100, 5000, -1])
def test_cut_safetensors(folder, size):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    assert f"model.safetensors of {folder} is corrupt or cut short" in refusal(folder)


def test_a_missing_shard(folder):
    tiny_model("llama").save_pretrained(folder, max_shard_size="40KB")
    (folder / "model.safetensors").unlink()
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert load(str(folder)).model.name_or_path == str(folder)
    shards[0].unlink()
    assert "cannot load the model" in refusal(folder)


def test_weights_that_lack_a_layer_are_not_filled_at_random(folder):
    change_config(folder, num_hidden_layers=3)
    assert "lack 9 of the model's tensors, e.g. model.layers.2." in refusal(folder)


def test_weights_of_another_shape(folder):
    change_config(folder, vocab_size=103)
    assert "do not fit its config" in refusal(folder)
    assert "expected (103, 42), got (101, 42)" in refusal(folder)


def test_weights_that_the_model_does_not_use_cause_a_warning(folder):
    change_config(folder, num_hidden_layers=1)
    with pytest.warns(UserWarning, match="no use for 9 of its tensors"):
        load(str(folder))


@pytest.mark.parametrize("changes", [{"hidden_size": "abc"}, {"num_attention_heads": -3}])
def test_a_config_that_makes_no_sense(folder, changes):
    assert str(folder) in refusal(change_config(folder, **changes))


def test_a_corrupt_or_missing_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")
    assert f"cannot load the tokenizer of {folder}" in refusal(folder)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert "expected a tokenizer" in refusal(folder)


@pytest.mark.parametrize("config", [T5Config(), ViTConfig()], ids=["t5", "vit"])
def test_a_model_that_is_no_causal_language_model(tmp_path, config):
    config.save_pretrained(tmp_path)
    message = f"expected a causal language model, got {tmp_path}, a model of type"
    assert refusal(tmp_path) == f"{message} '{config.model_type}'"


def test_code_in_the_checkpoint_is_not_run(folder):
    """Not even asked for: a prompt would wait for an answer."""
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    change_config(folder, model_type="quux", auto_map=auto_map)
    (folder / "evil.py").write_text("raise SystemExit('it ran')")
    assert "custom code" in refusal(folder)
