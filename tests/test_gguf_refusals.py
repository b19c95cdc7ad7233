"""GGUF files that are no whole model, damaged, or of another model than transformers can build."""

import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from gguf_writing import write_gguf
from loading import refusal
from tappa.errors import ModelError
from tappa.gguf_files import read_header, reading
from tappa.models import load
from tiny import save_tiny_gguf, tiny_model


@pytest.fixture(autouse=True)
def nothing_is_built(monkeypatch, cache):
    """What is refused is refused before a weight is read or a model takes memory."""
    monkeypatch.setattr(reading, "load_model", lambda *_, **__: pytest.fail("it built a model"))


def written(folder: Path, architecture: str, **changes: Any) -> Path:
    write_gguf(
        folder / "model.gguf", tiny_model(architecture, hidden_size=60), architecture, **changes
    )
    return folder / "model.gguf"


def without_a_model(path: Path, architecture: str, keys: dict[str, Any], tensor: str = "") -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in keys.items():
        adder: Any = {int: writer.add_uint16, str: writer.add_string, list: writer.add_array}[
            type(value)
        ]
        adder(name, value)
    if tensor:
        writer.add_tensor(tensor, np.ones((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


LORA = "blk.0.attn_q.weight.lora_a"


@pytest.mark.parametrize(
    ("architecture", "keys", "tensor", "kind"),
    [
        ("qwen2", {"general.type": "adapter", "adapter.type": "lora"}, LORA, "a LoRA adapter"),
        ("qwen2", {"adapter.type": "lora"}, LORA, "a LoRA adapter"),
        ("llama", {}, LORA, "a LoRA adapter"),
        ("clip", {"general.type": "mmproj"}, "v.patch_embd.weight", "(mmproj)"),
        ("clip", {"clip.projector_type": "gemma3"}, "v.patch_embd.weight", "(mmproj)"),
        ("llama", {"general.type": "imatrix"}, "blk.0.attn_q.weight.in_sum2", "importance matrix"),
        ("llama", {"imatrix.chunk_count": 3}, "blk.0.attn_q.weight.in_sum2", "importance matrix"),
        ("controlvector", {}, "direction.1", "a control vector"),
        ("llama", {"tokenizer.ggml.tokens": ["a", "b"]}, "", "a vocabulary"),
        ("llama", {"general.type": "tensorbook"}, "", "one of type 'tensorbook'"),
        ("llama", {"split.no": 1, "split.count": 3}, "blk.9.attn_q.weight", "part 2 of 3: merge"),
        ("llama", {"llama.block_count": 2}, "token_embd.weight", "lacks the key llama.embedding_"),
    ],
)
def test_a_file_that_is_no_whole_model(tmp_path, architecture, keys, tensor, kind):
    path = without_a_model(tmp_path / "part.gguf", architecture, keys, tensor)
    message = refusal(path)
    assert str(path) in message
    assert kind in message


@pytest.mark.parametrize(
    ("architecture", "name", "value"),
    [
        ("llama", "expert_count", 8),
        ("llama", "attention.scale", 0.5),
        ("llama", "attention.sliding_window", 7),
        ("llama", "attention.clamp_kqv", 3.0),
        ("llama", "attention.causal", False),
        ("llama", "attention.value_length", 7),
        ("llama", "attn_logit_softcapping", 30.0),
        ("llama", "final_logit_softcapping", 30.0),
        ("llama", "logit_scale", 0.125),
        ("llama", "residual_scale", 0.2),
        ("llama", "rope.scaling.alpha", 3.0),
        ("qwen2", "attention.sliding_window", 7),
        ("qwen2", "rope.dimension_sections", [2, 2, 1]),
        ("qwen2", "a key of the future", 1),
    ],
)
def test_a_key_that_the_class_has_no_place_for(tmp_path, architecture, name, value):
    message = refusal(written(tmp_path, architecture, keys={name: value}))
    assert name in message
    assert f"transformers' {architecture} does not do" in message


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("rope.scaling.type", "dynamic", "got 'dynamic'"),
        ("rope.scaling.type", "yarn", "yarn with a factor"),
        ("rope.freq_base", 0.0, "a positive rope.freq_base"),
        ("rope.freq_base", float("nan"), "a positive rope.freq_base"),
        ("rope.scaling.yarn_ext_factor", 0.5, "yarn_ext_factor"),
    ],
)
def test_rope_that_transformers_cannot_do(tmp_path, name, value, expected):
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0}
    keys = {**yarn, name: value} if "yarn_" in name else {name: value}
    assert expected in refusal(written(tmp_path, "qwen2", keys=keys))


def test_keys_that_ask_for_nothing_are_no_reason(tmp_path, monkeypatch):
    idle = {"expert_count": 0, "attention.causal": True, "attention.clamp_kqv": 0.0}
    idle |= {"logit_scale": 1.0, "attention.sliding_window": 0, "attention.scale": 10**-0.5}
    path = written(tmp_path, "llama", keys={**idle, "rope.scaling.finetuned": False})
    monkeypatch.undo()
    monkeypatch.setenv("TAPPA_CACHE", str(tmp_path))
    assert load(path).model.config.num_key_value_heads == 3


ONES = np.ones(60, np.float32)


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"blk.0.attn_sinks.weight": ONES}, "no use for 1 tensors: blk.0.attn_sinks.weight"),
        ({f"blk.{i}.ffn_up.bias": ONES for i in (0, 1)}, "no use for 2 tensors: blk.0.ffn_up.bias"),
        ({"blk.1.attn_q.bias": None}, "lacks 1 tensors: model.layers.1.self_attn.q_proj.bias"),
        ({"output_norm.weight": None}, "lacks 1 tensors: model.norm.weight"),
        ({"token_embd.weight": None}, "lacks the tensor token_embd.weight"),
        ({"output_norm.weight": ONES[1:]}, "expected 60 numbers in its tensor output_norm.weight"),
        ({"blk.2.ffn_up.weight": ONES}, "expected tensors of 2 layers, got those of 3"),
        ({"rope_freqs.weight": -ONES[:5]}, "positive numbers in rope_freqs.weight"),
        ({"rope_factors_long.weight": ONES[:5]}, "no rope_factors_short.weight"),
    ],
)
def test_tensors_that_do_not_fit_the_keys(tmp_path, tensors, expected):
    assert expected in refusal(written(tmp_path, "qwen2", tensors=tensors))


@pytest.mark.parametrize("name", ["block_count", "embedding_length", "feed_forward_length"])
@pytest.mark.parametrize("value", [0, 3, 2**31, 2**32 - 1])
def test_absurd_sizes(tmp_path, name, value):
    refusal(written(tmp_path, "qwen2", keys={name: value}))


@pytest.mark.parametrize("name", ["attention.head_count", "attention.key_length"])
def test_sizes_that_do_not_fit_the_tensors(tmp_path, name):
    refusal(written(tmp_path, "llama", keys={name: 2**30}))


def test_sizes_that_differ_by_layer(tmp_path):
    message = refusal(written(tmp_path, "llama", keys={"attention.head_count_kv": [3, 2]}))
    assert "one size as llama.attention.head_count_kv, got [3, 2]" in message


@pytest.mark.parametrize(
    ("general", "expected"),
    [
        ({"tokenizer.ggml.merges": ["t h", "q zz"]}, "'q zz' needs the token 'zz'"),
        ({"tokenizer.ggml.merges": ["t h", "t e"]}, "needs the token 'te'"),
        ({"tokenizer.ggml.merges": ["th"]}, "expected two tokens as a merge"),
        ({"tokenizer.ggml.tokens": None}, "expected a tokenizer in the file"),
        ({"tokenizer.ggml.model": None}, "expected a tokenizer in the file"),
        ({"tokenizer.ggml.eos_token_id": 2**31}, "tokenizer.ggml.eos_token_id below 100"),
        ({"tokenizer.ggml.token_type": [1, 2]}, "token_type of each of the 100 tokens"),
        ({"general.alignment": 0}, "general.alignment"),
    ],
)
def test_a_tokenizer_that_does_not_fit(tmp_path, general, expected):
    assert expected in refusal(written(tmp_path, "qwen2", general=general))


def content_of(tmp_path: Path) -> bytes:
    path = tmp_path / "whole.gguf"
    save_tiny_gguf(path)
    return path.read_bytes()


def test_a_file_that_is_cut_anywhere(tmp_path):
    content = content_of(tmp_path)
    path = tmp_path / "cut.gguf"
    for share in (
        0,
        3,
        4,
        23,
        24,
        25,
        99,
        400,
        1500,
        3000,
        5000,
        len(content) // 2,
        len(content) - 40,
    ):
        path.write_bytes(content[:share])
        refusal(path)


def test_counts_and_lengths_beyond_the_file(tmp_path):
    content = content_of(tmp_path)
    path = tmp_path / "absurd.gguf"
    for at in (8, 16, 24):  # tensors, keys, length of the first key
        for value in (2**20, 2**62, 2**64 - 1):
            path.write_bytes(content[:at] + struct.pack("<Q", value) + content[at + 8 :])
            refusal(path)
    path.write_bytes(content[:4] + struct.pack("<I", 1) + content[8:])
    assert "version 2 or 3, got 1" in refusal(path)
    path.write_bytes(content[:4] + struct.pack(">I", 3) + content[8:])
    assert "version 2 or 3, got 50331648" in refusal(path)


@pytest.mark.parametrize("shape", [(2**40, 60), (60, 2**62), (0, 60)])
def test_a_tensor_larger_than_the_file(tmp_path, shape):
    content = content_of(tmp_path)
    name = b"output_norm.weight"
    at = content.rindex(name) + len(name)
    new = struct.pack("<IQQ", 2, *shape[::-1])
    path = tmp_path / "absurd.gguf"
    path.write_bytes(content[:at] + new + content[at + 12 :])
    refusal(path)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (b"blk.0.ffn_up.weight", b"blk.1.ffn_up.weight", "'blk.1.ffn_up.weight' is there twice"),
        (b"qwen2.embedding_length", b"qwen2.context_length\0\0", "lacks the key"),
        (b"general.architecture", b"general.architectur\xff", "no UTF-8"),
    ],
)
def test_names_that_are_wrong(tmp_path, old, new, expected):
    path = tmp_path / "wrong.gguf"
    path.write_bytes(content_of(tmp_path).replace(old, new))
    assert expected in refusal(path)


def test_bytes_changed_at_random_raise_nothing_but_model_errors(tmp_path):
    content = content_of(tmp_path)
    end = content.rindex(b"output_norm.weight") + 60
    generator = np.random.default_rng(0)
    path = tmp_path / "changed.gguf"
    for _ in range(300):
        changed = bytearray(content)
        for at in generator.integers(4, end, 3):
            changed[at] = generator.integers(256)
        path.write_bytes(changed)
        with suppress(ModelError):
            reading._described(path, "it")


def test_tensors_lie_where_the_header_says(tmp_path):
    path = tmp_path / "whole.gguf"
    model = save_tiny_gguf(path)
    header = read_header(path)
    assert header.numbers("output_norm.weight") == pytest.approx(model.model.norm.weight.tolist())
    assert header.tensors["token_embd.weight"].shape == (101, 60)
    assert header.get("attention.head_count_kv") == 3
