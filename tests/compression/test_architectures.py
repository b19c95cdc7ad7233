"""Compression on architectures that do more with a cache than hand its keys to their attention."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, DynamicCache

from tappa.cache_argument import with_cache
from tappa.compression import CompressedCache, compressed, generate, record, stack_caches
from tappa.compression.fit import check_mask, expansion_of
from tappa.compression.layer import CompressedLayer
from tappa.errors import CompressionError
from tappa.interface import AttentionSwitch

SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 36,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
LATENT = {
    **{"num_key_value_heads": 4, "q_lora_rank": 22, "kv_lora_rank": 26},
    **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 14, "v_head_dim": 10},
}
EXPERTS = {
    **{"num_local_experts": 3, "n_routed_experts": 3, "num_experts": 3, "num_experts_per_tok": 2},
    **{"n_group": 1, "topk_group": 1, "moe_intermediate_size": 20, "n_shared_experts": 1},
    **{"first_k_dense_replace": 1, "shared_expert_intermediate_size": 20},
}
SHARED = {
    **{"vocab_size_per_layer_input": 101, "hidden_size_per_layer_input": 6, "sliding_window": 16},
    **{"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2},
}
PHI_ROPE = {
    **{"rope_type": "longrope", "rope_theta": 10000.0, "factor": 8.0},
    **{"short_factor": [1.0] * 6, "long_factor": [4.0 + i for i in range(6)]},
}
PROMPT = torch.randint(3, 90, (1, 90), generator=torch.Generator().manual_seed(0))
READ = 67  # tokens of the prompt that come at once


@dataclass(frozen=True)
class Kind:
    """A tiny model, and how its attention calls use the cache: which layer, which KV heads."""

    model: str
    sizes: dict[str, Any]
    # layer of the cache for each attention call of a pass, where that is not the next one
    calls: tuple[int, ...] | None = None
    spread: Callable[[Tensor, int], Tensor] = lambda x, heads: x.repeat_interleave(
        heads // x.shape[1], 1
    )


def tiled(x: Tensor, heads: int) -> Tensor:
    return x.repeat(1, heads // x.shape[1], 1, 1)


KINDS = {
    "llama": Kind("llama", {}),
    "heads of layers": Kind("llama", {}),
    "qwen3_moe": Kind("qwen3_moe", EXPERTS),
    "dynamic ntk": Kind(
        "llama",
        {
            "max_position_embeddings": 40,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        },
    ),
    "gpt_neox": Kind("gpt_neox", {}),
    "deepseek_v2": Kind("deepseek_v2", LATENT | EXPERTS | {"head_dim": 8}),
    "deepseek_v3": Kind("deepseek_v3", LATENT | EXPERTS | {"head_dim": 8}),
    "glm4_moe_lite": Kind("glm4_moe_lite", LATENT | EXPERTS | {"head_dim": 8}),
    "youtu": Kind("youtu", LATENT | {"head_dim": 8}),
    "minicpm3": Kind("minicpm3", LATENT | {"head_dim": 8}),
    "jetmoe": Kind("jetmoe", EXPERTS | {"kv_channels": 12}, spread=tiled),
    "hrm_text": Kind("hrm_text", {}),
    "gemma4_text": Kind("gemma4_text", SHARED | {"global_head_dim": 20}, (0, 1, 0, 1)),
    "gemma3n_text": Kind(
        "gemma3n_text",
        SHARED
        | {"laurel_rank": 4, "intermediate_size": [36] * 4, "altup_num_inputs": 2}
        | {"activation_sparsity_pattern": [0.0] * 4},
        (0, 1, 0, 1),
    ),
    "phi3 longrope": Kind(
        "phi3", {"rope_parameters": PHI_ROPE, "original_max_position_embeddings": 200}
    ),
}
# whose RoPE tables are not understood, so that methods which turn queries back are refused
PLAIN_ONLY = {"deepseek_v2"}


def make(name: str, **changes: Any) -> Any:
    """A tiny model of a kind; skips the test where this transformers does not know it."""
    kind = KINDS[name]
    if kind.model not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind.model}")
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind.model, **{**SIZES, **kind.sizes, **changes})
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for weight in model.parameters():
        if weight.dim() > 1:  # large enough that attention is far from uniform
            torch.nn.init.normal_(weight, std=0.15)
    if name == "heads of layers":
        attention = model.model.layers[1].self_attn
        for projection in (attention.k_proj, attention.v_proj):
            projection.weight = torch.nn.Parameter(projection.weight[:12], requires_grad=False)
        attention.num_key_value_groups = 4
    return model


def read(model: Any, ids: Tensor, cache: Any, **options: Any) -> Tensor:
    with torch.inference_mode():
        return model(ids, use_cache=True, **with_cache(model, cache), **options).logits


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


class Masked:
    """A kind's model on a full cache, where each call sees only what a compressed cache held."""

    def __init__(self, model: Any, kind: Kind, other: CompressedCache) -> None:
        self.model, self.kind, self.other = model, kind, other
        self.cache = DynamicCache(config=model.config)
        self.switch = AttentionSwitch(model, self.attend)
        self.calls = 0

    def __call__(self, ids: Tensor) -> Tensor:
        self.calls = 0
        self.switch.on()
        try:
            return read(self.model, ids, self.cache)
        finally:
            self.switch.off()

    def attend(self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        calls = self.kind.calls
        number = self.calls if calls is None else calls[self.calls]
        self.calls += 1
        layer = self.other.layers[number]
        if isinstance(layer, CompressedLayer):
            heads, new, seen = *q.shape[1:3], k.shape[2]
            positions = layer.positions if new > 1 else layer.storage().padded()[2]
            positions = positions.long()
            held = torch.zeros(*positions.shape[:2], seen + 1, dtype=torch.bool)
            held.scatter_(2, torch.where(positions < 0, seen, positions), True)
            causal = torch.arange(seen) <= torch.arange(seen - new, seen)[:, None]
            mask = self.kind.spread(held[:, :, None, :seen] & causal, heads)
        return self.switch.own_kernel(module)(module, q, k, v, mask, **kwargs)


def pieces() -> list[Tensor]:
    """A prompt, single tokens, several at once."""
    return list(PROMPT.split([READ, 1, 1, 1, 1, 1, 1, 5, 1, 1, 10], 1))


@pytest.mark.parametrize("name", KINDS)
def test_a_budget_for_all_gives_the_logits_of_the_model(name: str) -> None:
    model = make(name)
    plain = DynamicCache(config=model.config)
    caches = [compressed(model, "full"), compressed(model, "snapkv", 1000)]
    if name not in PLAIN_ONLY:
        caches.append(compressed(model, "tappa", 1000))
    for piece in pieces():
        expected = read(model, piece, plain)
        for cache in caches:
            close(read(model, piece, cache), expected)
    assert all(cache.tokens_held() == cache.tokens_seen == 90 for cache in caches)


@pytest.mark.parametrize("method", ["snapkv", "adakv", "expected_attention"])
@pytest.mark.parametrize("name", KINDS)
def test_decoding_is_that_of_the_full_cache_without_the_dropped_tokens(
    name: str, method: str
) -> None:
    if name in PLAIN_ONLY and method == "expected_attention":
        pytest.skip("needs the rotation of queries")
    model = make(name)
    options: dict[str, Any] = {} if method == "expected_attention" else {"window": 7}
    cache = compressed(model, method, 24, every=3, **options)
    reference = Masked(model, KINDS[name], cache)
    for piece in pieces():
        close(read(model, piece, cache), reference(piece))
    assert cache.tokens_held() <= 24 < cache.tokens_seen
    for number, layer in enumerate(cache.layers):
        for head in range(layer.kv_heads if isinstance(layer, CompressedLayer) else 0):
            held = cache.positions_held(number, head)
            assert held == sorted(set(held))
            assert held[-1] == 89 or not cache.method.window


@pytest.mark.parametrize("name", ["youtu", "minicpm3", "jetmoe", "heads of layers"])
def test_what_the_last_queries_attend_to_is_kept(name: str) -> None:
    """Of the attention that the model itself computes, by its eager kernel."""
    model = make(name, attn_implementation="eager")
    cache = compressed(model, "snapkv", 24, window=8, kernel=1)
    read(model, PROMPT, cache)
    with torch.inference_mode():
        every = model(PROMPT, output_attentions=True).attentions
    for number, weights in enumerate(every):
        layer = cache.compressed_layers[number]
        paid = weights[0, :, -8:, :-8].mean(1)
        groups = layer.for_queries(torch.arange(layer.kv_heads)[None], len(paid))[0]
        for head in range(layer.kv_heads):
            most = paid[groups == head].mean(0).topk(16).indices.tolist()
            kept = set(most) & set(cache.positions_held(number, head))
            assert len(kept) >= 15, "all but a near tie for the last place"


@pytest.mark.parametrize("name", ["youtu", "deepseek_v3", "jetmoe", "hrm_text", "gemma4_text"])
def test_padded_rows_are_as_if_alone(name: str) -> None:
    model = make(name)
    mask = torch.ones(2, READ, dtype=torch.long)
    mask[0, :20] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    ids = PROMPT[:, :READ].repeat(2, 1)
    options = {"attention_mask": mask, "position_ids": positions}
    full, small = compressed(model, "full"), compressed(model, "snapkv", 24, window=7)
    together, _ = (read(model, ids, cache, **options) for cache in (full, small))
    alone = compressed(model, "snapkv", 24, window=7)
    expected = read(model, ids[:1, 20:], alone)
    close(together[:1, 20:], expected)
    number = cache_layers(alone)[0]
    shifted = [position + 20 for position in alone.positions_held(number, 0)]
    assert small.positions_held(number, 0, row=0) == shifted
    mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
    options = {"attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1}
    together = read(model, PROMPT[:, READ : READ + 1].repeat(2, 1), small, **options)
    close(together[:1], read(model, PROMPT[:, READ : READ + 1], alone))


def cache_layers(cache: CompressedCache) -> list[int]:
    return [n for n, layer in enumerate(cache.layers) if isinstance(layer, CompressedLayer)]


@pytest.mark.parametrize("name", ["youtu", "jetmoe", "gemma4_text", "heads of layers"])
def test_recordings_stacks_and_steps_are_as_reading(name: str) -> None:
    model = make(name)
    prompt, more = PROMPT[:, :READ], PROMPT[:, READ : READ + 1]
    cache = compressed(model, "snapkv", 24, window=7)
    read(model, prompt, cache)
    recorded = record(model, prompt).compress("snapkv", [24], window=7)[0]
    for number in cache_layers(cache):
        assert recorded.positions_held(number, 0) == cache.positions_held(number, 0)
    stacked = stack_caches([cache, recorded])
    cache.frozen = True  # as a stack is
    expected = read(model, more, cache)
    close(read(model, more.repeat(2, 1), stacked), expected.repeat(2, 1, 1))
    if not (name == "youtu" and cache.compressed_layers[0].plain):  # older ones cache all keys
        with pytest.raises(CompressionError, match="cannot decode in fixed steps"):
            generate(compressed(model, "snapkv", 24, window=7), prompt, 4, graph=True)
    written = generate(compressed(model, "snapkv", 24, window=7), prompt, 4)
    assert written.shape == (1, READ + 4)


def test_layers_with_fewer_heads_get_a_smaller_part_of_the_budget() -> None:
    model = make("heads of layers")
    for method, budget in (("snapkv", 20), ("snapkv", 0.25), ("adakv", 20)):
        cache = compressed(model, method, budget, window=7)
        read(model, PROMPT[:, :80], cache)
        assert cache.total(0) == 7 * 20, "KV heads 2 + 1 + 2 + 2"
        sums = [sum(layer.storage().lengths) for layer in cache.compressed_layers]
        assert sums == [40, 20, 40, 40]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("diffllama", "attends to other values than its cache returned"),
        ("doge", "one mask for all heads"),
    ],
)
def test_models_that_use_keys_or_values_otherwise_are_refused_in_a_line(
    kind: str, said: str
) -> None:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES)).eval()
    if not model._supports_attention_backend:
        said = "does not use transformers' attention interface"
    with pytest.raises(CompressionError, match=said):
        read(model, PROMPT, compressed(model, "tappa", 24, window=7))


def test_attention_that_never_sees_the_cache_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing would be dropped, and nobody told."""
    model = make("llama")
    attention = model.model.layers[2].self_attn
    plain = attention.forward

    def copied(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(attention.config, "_attn_implementation", "sdpa")
        try:
            return plain(*args, **kwargs)
        finally:
            monkeypatch.undo()

    attention.forward = copied
    with pytest.raises(CompressionError, match=r"does not attend .* \(layers 2 of 4\)"):
        read(model, PROMPT, compressed(model, "snapkv", 24, window=7))


def test_keys_that_attention_gets_must_follow_from_those_cached() -> None:
    cached = torch.randn(1, 2, 11, 6), torch.randn(1, 2, 11, 4)
    module = torch.nn.Module()
    assert expansion_of(module, cached, cached) is None
    keys, values = cached
    turned = expansion_of(module, cached, (keys.repeat(1, 3, 1, 1), values.repeat(1, 3, 1, 1)))
    assert turned is not None
    assert turned.heads == (0, 1, 0, 1, 0, 1)
    assert turned.mean_of([1.0, 10.0, 2.0, 20.0, 6.0, 60.0]) == [3, 30]
    assert turned.mean(torch.arange(6.0)[:, None]).tolist() == [[2], [3]]
    twice = keys.repeat_interleave(2, 1), values.repeat_interleave(2, 1)
    runs = expansion_of(module, cached, twice)
    assert runs is not None
    assert runs.heads == (0, 0, 1, 1)
    for others in ((2 * keys, values), (keys, values[:, [1, 0]])):
        with pytest.raises(CompressionError, match="other keys or values"):
            expansion_of(module, cached, others)
    with pytest.raises(CompressionError, match="one mask for all heads"):
        check_mask(torch.zeros(1, 2, 3, 3))


# ---- models that read all of a text again when it has grown


def long_phi() -> Any:
    rope = {"original_max_position_embeddings": 84} | PHI_ROPE
    return make("phi3 longrope", rope_parameters=rope, original_max_position_embeddings=84)


def by_reading_anew(model: Any, ids: Tensor, new: int) -> Tensor:
    """Logits of the greedy text, each of a pass of its own over all tokens before."""
    with torch.inference_mode():
        for _ in range(new):
            logits = model(ids, use_cache=False).logits[:, -1]
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids


def keeps_the_text(model: Any) -> bool:
    """Whether this transformers, when it drops a cache, still has all the tokens."""
    return "next_sequence_length" in inspect.getsource(type(model).prepare_inputs_for_generation)


@pytest.mark.parametrize("length", [80, 84, 86])
def test_a_text_that_outgrows_the_short_rope_is_read_again(length: int) -> None:
    model, ids = long_phi(), PROMPT[:, :length]
    expected = by_reading_anew(model, ids, 9)
    assert torch.equal(generate(compressed(model, "full"), ids, 9), expected)
    cache = compressed(model, "snapkv", 24, window=7)
    generate(cache, ids, 9)
    assert cache.tokens_held() <= 24
    assert cache.tokens_seen == length + 8
    cache, options = compressed(model, "full"), {"do_sample": False, "max_new_tokens": 9}
    if length <= 84 and not keeps_the_text(model):
        with pytest.raises(CompressionError, match=r"throws its cache away .* past 84"):
            model.generate(ids, **with_cache(model, cache), **options)
        return
    assert torch.equal(model.generate(ids, **with_cache(model, cache), **options), expected)
    assert cache.tokens_seen == length + 8


def test_a_text_that_outgrows_the_short_rope_needs_all_its_tokens() -> None:
    model = long_phi()
    cache = compressed(model, "full")
    read(model, PROMPT[:, :84], cache)
    with pytest.raises(CompressionError, match="reads all tokens again"):
        read(model, PROMPT[:, 84:85], cache)
    other = compressed(model, "full")
    read(model, PROMPT[:, :84], other)
    with torch.inference_mode():
        model(PROMPT[:, :85])  # a pass of its own is not taken for the cache's
    assert other.tokens_seen == 84
