import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from transformers.utils import logging as transformers_logging

from loading import PROMPT, refusal
from tappa import models
from tappa.models import context_length, load, require_rope
from tiny import ROPE_KINDS, save_tiny, tiny_model


@pytest.fixture
def folder(tmp_path):
    return save_tiny(tmp_path / "llama")


@pytest.mark.parametrize("kind", ROPE_KINDS)
def test_load_gives_the_saved_model(tmp_path, kind):
    model, tokenizer = load(str(save_tiny(tmp_path / kind, kind)))
    assert torch.equal(model(PROMPT).logits, tiny_model(kind)(PROMPT).logits)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.config._name_or_path == model.name_or_path == str(tmp_path / kind)
    assert context_length(model) == (64 if kind == "llama-dynamic" else 512)
    assert tokenizer("Hi").input_ids == [45, 78]


def test_tied_weights_are_not_missing(tmp_path):
    model, _ = load(str(save_tiny(tmp_path / "tied", tie_word_embeddings=True)))
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_threads_may_load_at_once(tmp_path):
    folder = save_tiny(tmp_path / "tied", tie_word_embeddings=True)
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(lambda _: load(str(folder)).model(PROMPT).logits, range(12)))
    assert all(torch.equal(logits, loaded[0]) for logits in loaded)


def test_load_leaves_the_settings_of_transformers_as_they_were(folder):
    level = transformers_logging.get_verbosity()
    load(str(folder))
    refusal(folder, attn_implementation="no such thing")
    assert transformers_logging.get_verbosity() == level
    assert transformers_logging.is_progress_bar_enabled()


def test_dtype_and_attention_are_as_asked(folder):
    model, _ = load(str(folder), dtype="bfloat16", attn_implementation="eager")
    assert model.dtype == torch.bfloat16
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert model.config._attn_implementation == "eager"
    assert load(str(folder), dtype=torch.float64).model.dtype == torch.float64


def test_dtype_is_float32_on_the_cpu_whatever_the_checkpoint_holds(tmp_path):
    tiny_model("llama").bfloat16().save_pretrained(tmp_path / "half")
    save_tiny(tmp_path / "full")
    shutil.copytree(tmp_path / "half", tmp_path / "full", dirs_exist_ok=True)
    assert load(str(tmp_path / "full"), device="cpu").model.dtype == torch.float32


def test_unknown_devices_and_dtypes_are_refused_with_the_known_ones(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "device auto, all, tp, cpu, cuda or cuda:N, got 'tpu'" in refusal(folder, device="tpu")
    assert "PyTorch sees no GPU" in refusal(folder, device="cuda:1")
    for dtype in ("int8", torch.int8):
        assert "auto, float32, float64, bfloat16, float16, got" in refusal(folder, dtype=dtype)


@pytest.mark.parametrize("name", ["/no/such", "./no/such", "no/such/model", "no.gguf", "~/no/such"])
def test_a_missing_path_is_no_hub_id(name):
    assert refusal(name) == f"no such model file or folder: {name}"


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_refused(name):
    assert "hub id, got" in refusal(name)


def test_a_hub_id_that_cannot_be_fetched(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert refusal("some-owner/some-model").endswith("the hub is out of reach")
    assert "cannot be fetched: Repo id must" in refusal("no model!")

    class Missing(RepositoryNotFoundError):
        def __init__(self):
            Exception.__init__(self, "404\nmuch more")

    def missing(*_, **__):
        raise Missing

    monkeypatch.setattr(models, "snapshot_download", missing)
    assert refusal("some-owner/some-model").endswith("the hub has no public model of that name")


def test_a_hub_model_is_fetched_without_pickles_and_loaded(folder, monkeypatch):
    asked = {}

    def download(hub_id, **options):
        asked.update(options, hub_id=hub_id)
        return str(folder)

    monkeypatch.setattr(models, "snapshot_download", download)
    assert load("some-owner/some-model").model.name_or_path == "some-owner/some-model"
    assert asked["hub_id"] == "some-owner/some-model"
    assert not any(
        "bin" in pattern or pattern in ("*", "*.py") for pattern in asked["allow_patterns"]
    )


def test_a_file_that_is_no_gguf_file(folder):
    message = "expected a .gguf file, a model folder or a hub id"
    assert message in refusal(folder / "model.safetensors")


def test_a_model_without_rope_is_refused_by_name(tmp_path):
    folder = save_tiny(tmp_path / "gpt2", "gpt2")
    message = refusal(folder)
    assert "rotary position embeddings (RoPE), got GPT2LMHeadModel" in message
    assert "'transformer.wpe' instead" in message
    assert load(str(folder), check_rope=False).model.config.model_type == "gpt2"


@pytest.mark.parametrize("kind", ROPE_KINDS)
def test_require_rope_accepts_every_rope_model(kind):
    require_rope(tiny_model(kind))


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("TAPPA_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert str(models._cache()) == "/home/someone/.cache/tappa"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert models._cache() == tmp_path / "tappa"
    monkeypatch.setenv("TAPPA_CACHE", "~/elsewhere")
    assert str(models._cache()) == "/home/someone/elsewhere"


def test_without_the_package_the_default_is_a_hub_model(monkeypatch):
    monkeypatch.setattr(models, "DEFAULT_PACKAGE", "no_such_package")
    assert models._default_source() == "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.xdist_group("smollm2")
def test_the_default_model_reads_english(smollm2):
    model, tokenizer = smollm2
    assert model.name_or_path == "SmolLM2-135M-Instruct"
    assert model.config.num_hidden_layers == 30
    assert model.dtype == torch.float32
    assert context_length(model) == 8192
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
