import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    HunYuanDenseV1Config,
    PreTrainedModel,
)

from tappa.capture import LayerView, prefill
from tappa.errors import CaptureError, ModelError
from tiny import GROUPED, ROPE_KINDS, tiny_model

TOKENS = 37
every_kind = pytest.mark.parametrize("kind", ROPE_KINDS)
IDS = torch.randint(3, 101, (2, TOKENS), generator=torch.Generator().manual_seed(0))


def views_of(model: PreTrainedModel, ids: Tensor = IDS, **options: Any) -> list[LayerView]:
    views: list[LayerView] = []
    prefill(model, ids, views.append, **options)
    return views


def plain(model: PreTrainedModel, ids: Tensor = IDS, **options: Any) -> Any:
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False, **options)


def close(actual: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=1e-5)


@pytest.mark.same_kernel
@pytest.mark.parametrize(
    ("kind", "implementation"),
    [*((kind, "sdpa") for kind in ROPE_KINDS), ("llama", "eager"), ("gemma3", "eager")],
)
def test_logits_are_bit_identical(kind: str, implementation: str) -> None:
    model = tiny_model(kind)
    model.set_attn_implementation(implementation)
    before = plain(model).logits
    assert torch.equal(prefill(model, IDS, lambda view: None), before)
    assert torch.equal(plain(model).logits, before)


@pytest.mark.same_kernel
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_padded_logits_are_bit_identical(kind: str) -> None:
    model, mask = tiny_model(kind), torch.ones_like(IDS)
    mask[1, :13] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    expected = plain(model, attention_mask=mask, position_ids=positions).logits
    assert torch.equal(prefill(model, IDS, lambda view: None, attention_mask=mask), expected)


@pytest.mark.same_kernel
def test_logits_to_keep() -> None:
    model = tiny_model("llama")
    last = prefill(model, IDS, lambda view: None, logits_to_keep=1)
    close(last, plain(model).logits[:, -1:])


def state(model: PreTrainedModel) -> list:
    """Everything that a capture changes while it runs."""
    return [
        model.config._attn_implementation,
        dict(AttentionInterface._global_mapping),
        dict(AttentionMaskInterface._global_mapping),
        [(dict(m._forward_pre_hooks), dict(m._forward_hooks)) for m in model.modules()],
        [m.forward for m in model.modules()],
    ]


@pytest.mark.parametrize("kind", ["llama", "gemma3", "glm"])
def test_everything_is_put_back(kind: str) -> None:
    model = tiny_model(kind)
    prefill(model, IDS, lambda view: None)  # names of attention functions stay registered
    before = state(model)
    during = []
    prefill(model, IDS, lambda view: during.append(state(model)[:4]))
    assert all(s != before[:4] for s in during)
    assert state(model) == before


@pytest.mark.same_kernel
def test_everything_is_put_back_when_the_consumer_raises() -> None:
    def fail(view: LayerView) -> None:
        raise ZeroDivisionError

    model = tiny_model("llama")
    before, logits = state(model), plain(model).logits
    with pytest.raises(ZeroDivisionError):
        prefill(model, IDS, fail)
    assert state(model) == before
    assert torch.equal(plain(model).logits, logits)


def test_no_capture_within_a_capture() -> None:
    model = tiny_model("llama")
    before = state(model)
    with pytest.raises(CaptureError, match="already being captured"):
        prefill(model, IDS, lambda view: views_of(model).clear())
    assert state(model) == before


@pytest.mark.same_kernel
def test_two_models_can_be_captured_at_once() -> None:
    outer, inner = tiny_model("llama"), tiny_model("glm")
    seen: list[LayerView] = []
    logits = prefill(outer, IDS, lambda view: seen.extend(views_of(inner)))
    assert len(seen) == 4 * 4  # 2 layers of 2 prompts, in each of as many
    assert torch.equal(logits, plain(outer).logits)


def test_each_layer_of_each_prompt_is_shown_once() -> None:
    views = views_of(tiny_model("gemma3"))
    assert [(v.layer, v.row) for v in views] == [(n, row) for n in range(3) for row in range(2)]
    for view in views:
        assert view.queries.shape == (6, TOKENS, 10)
        assert view.keys.shape == (3, TOKENS, 10)
        assert (view.query_start, view.key_start) == (0, 0)
    assert [v.attention.window for v in views[::2]] == [7, 7, None]
    assert {v.attention.scale for v in views} == {13**-0.5}


def attention_from(view: LayerView) -> Tensor:
    """The attention weights of a layer, from what the view says alone."""
    group = len(view.queries) // len(view.keys)
    keys = view.keys.double().repeat_interleave(group, 0)
    rows = view.query_start + torch.arange(view.queries.shape[1])
    visible = view.attention.visible(rows, view.key_start + torch.arange(keys.shape[1]))
    logits = view.attention.scale * view.queries.double() @ keys.mT
    return logits.masked_fill(~visible, -torch.inf).softmax(-1).float()


@every_kind
def test_views_give_the_attention_of_the_model(kind: str) -> None:
    model = tiny_model(kind)
    model.set_attn_implementation("eager")
    attentions = plain(model, output_attentions=True).attentions
    views = views_of(model)
    assert len(views) == 2 * len(attentions)
    for view in views:
        close(attention_from(view), attentions[view.layer][view.row])


def attention_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    return {
        int(m.layer_idx): m  # type: ignore[arg-type]
        for m in model.modules()
        if hasattr(m, "layer_idx") and type(m).__name__.endswith("Attention")
    }


@contextmanager
def unturned(module: nn.Module) -> Iterator[None]:
    """Take RoPE out of one attention module: angle 0 everywhere, with yarn's factor kept."""

    def change(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        call = signature(module.forward).bind(*args, **kwargs)
        cos, sin = call.arguments["position_embeddings"]
        call.arguments["position_embeddings"] = torch.hypot(cos, sin), torch.zeros_like(sin)
        return call.args, call.kwargs

    hook = module.register_forward_pre_hook(change, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def queries_without_rope(model: PreTrainedModel, layer: int) -> Tensor:
    """The queries of a layer before RoPE, by running the model with that layer's RoPE left out."""
    seen: dict[int, Tensor] = {}
    sdpa = AttentionInterface()["sdpa"]

    def spy(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen[module.layer_idx] = query
        return sdpa(module, query, *args, **kwargs)

    AttentionInterface.register("spy", spy)
    AttentionMaskInterface.register("spy", AttentionMaskInterface()["sdpa"])
    try:
        model.set_attn_implementation("spy")
        with unturned(attention_modules(model)[layer]):
            plain(model)
    finally:
        model.set_attn_implementation("sdpa")
        for interface in (AttentionInterface, AttentionMaskInterface):
            interface._global_mapping.pop("spy", None)
    return seen[layer]


@every_kind
def test_unrotated_queries_are_those_before_rope(kind: str) -> None:
    model = tiny_model(kind)
    views = views_of(model)
    for layer in attention_modules(model):
        expected = queries_without_rope(model, layer)
        shown = [view for view in views if view.layer == layer]
        assert len(shown) == len(expected) == 2
        for view in shown:
            close(view.queries_before, expected[view.row])


def inv_freq_of(model: PreTrainedModel, layer: int) -> Tensor:
    types = getattr(model.config, "layer_types", None) or []
    buffers = dict(model.named_buffers())
    own = [n for n in buffers if n.endswith("inv_freq") and "original" not in n]
    if len(own) > 1:
        own = [n for n in own if types[layer] in n]
    [name] = own
    return buffers[name].double()


@every_kind
def test_frequencies_are_those_of_the_model(kind: str) -> None:
    model = tiny_model(kind)
    for view in views_of(model):
        assert torch.equal(view.rotary.theta, inv_freq_of(model, view.layer))
        assert view.rotary.dim == view.queries.shape[-1]


def test_frequencies_by_hand() -> None:
    def theta(kind: str) -> list[list[float]]:
        return [v.rotary.theta.tolist() for v in views_of(tiny_model(kind), IDS[:1])]

    powers = [10_000 ** (-m / 5) for m in range(5)]
    assert theta("llama") == [pytest.approx(powers)] * 2
    assert theta("llama-linear") == [pytest.approx([p / 4 for p in powers])] * 2
    near = [100 ** (-m / 5) for m in range(5)]
    assert theta("gemma3") == [pytest.approx(near)] * 2 + [pytest.approx([p / 8 for p in powers])]
    assert theta("gpt_neox") == [pytest.approx([1, 0.1, 0.01])] * 2
    assert theta("glm") == [pytest.approx([1, 0.1, 0.01])] * 2


@pytest.mark.parametrize(
    ("kind", "first", "second", "rest"),
    [
        ("llama", [0, 1, 2, 3, 4], [5, 6, 7, 8, 9], []),
        ("gpt_neox", [0, 1, 2], [3, 4, 5], list(range(6, 24))),
        ("cohere", [0, 2, 4, 6, 8], [1, 3, 5, 7, 9], []),
        ("glm", [0, 2, 4], [1, 3, 5], list(range(6, 12))),
    ],
)
def test_layout_of_known_models(kind: str, first: list, second: list, rest: list) -> None:
    rotary = views_of(tiny_model(kind))[0].rotary
    assert rotary.first.tolist() == first
    assert rotary.second.tolist() == second
    assert rotary.unrotated.tolist() == rest


def padded(side: str) -> tuple[Tensor, Tensor]:
    """Both prompts of IDS, the second one cut to 23 tokens and padded again."""
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    pad = slice(0, TOKENS - 23) if side == "left" else slice(23, TOKENS)
    ids[1, pad] = mask[1, pad] = 0
    return ids, mask


@pytest.mark.parametrize(
    ("kind", "side"),
    [*((kind, "left") for kind in ROPE_KINDS), ("llama", "right"), ("mistral", "right")],
)
def test_padding_is_cut_off(kind: str, side: str) -> None:
    model = tiny_model(kind)
    ids, mask = padded(side)
    together = views_of(model, ids, attention_mask=mask)
    for row in range(2):
        alone = views_of(model, ids[row : row + 1, mask[row].bool()])
        shown = [view for view in together if view.row == row]
        assert len(shown) == len(alone)
        for view, expected in zip(shown, alone, strict=True):
            assert (view.layer, view.attention) == (expected.layer, expected.attention)
            assert (view.query_start, view.key_start) == (0, 0)
            close(view.queries, expected.queries)
            close(view.keys, expected.keys)


@pytest.mark.parametrize("hole", [[5], [0, 9], list(range(TOKENS))])
def test_padding_inside_a_prompt_is_refused(hole: list[int]) -> None:
    mask = torch.ones_like(IDS)
    mask[1, hole] = 0
    with pytest.raises(CaptureError, match="padding on the left or on the right"):
        views_of(tiny_model("llama"), attention_mask=mask)


@every_kind
def test_chunks_are_pieces_of_the_whole(kind: str) -> None:
    model, ids, chunk = tiny_model(kind), IDS[:1], 11
    pieces = defaultdict(list)
    for view in views_of(model, ids, chunk=chunk):
        pieces[view.layer].append(view)
    for whole in views_of(model, ids):
        views = pieces[whole.layer]
        assert [v.query_start for v in views] == list(range(0, TOKENS, chunk))
        close(torch.cat([v.queries for v in views], 1), whole.queries)
        for view in views:
            seen = view.key_start + view.keys.shape[1]
            assert seen == view.query_start + view.queries.shape[1]
            close(view.keys, whole.keys[:, view.key_start : seen])
            rows = slice(view.query_start, seen)
            close(attention_from(view), attention_from(whole)[:, rows, view.key_start : seen])


def test_chunked_logits_are_those_of_the_last_piece() -> None:
    model = tiny_model("mistral")
    logits = prefill(model, IDS, lambda view: None, chunk=11)
    close(logits, plain(model).logits[:, 33:], atol=1e-4)


def test_chunks_with_padding_are_refused() -> None:
    ids, mask = padded("left")
    with pytest.raises(CaptureError, match="without padding"):
        views_of(tiny_model("llama"), ids, attention_mask=mask, chunk=11)


def test_a_full_mask_is_no_padding() -> None:
    assert len(views_of(tiny_model("llama"), attention_mask=torch.ones_like(IDS), chunk=23)) == 8


def test_dynamic_scaling_beyond_the_context() -> None:
    ids = torch.cat([IDS[:1], IDS[1:]], 1)  # 74 tokens, of a context of 64
    model = tiny_model("llama-dynamic")
    for view in views_of(model, ids):
        assert torch.equal(view.rotary.theta, inv_freq_of(model, view.layer))
        assert view.rotary.theta[-1] < 0.9 * 10_000 ** (-4 / 5)
    with pytest.raises(CaptureError, match="chunk=None"):
        views_of(tiny_model("llama-dynamic"), ids, chunk=31)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_half_precision_is_shown_in_single_precision(kind: str) -> None:
    model = tiny_model(kind).bfloat16()
    expected = plain(model).logits
    views: list[LayerView] = []
    assert torch.equal(prefill(model, IDS, views.append), expected)
    assert {(v.queries.dtype, v.keys.dtype) for v in views} == {(torch.float32, torch.float32)}
    for view in views:
        assert torch.equal(view.rotary.theta, inv_freq_of(model, view.layer))


def test_a_model_without_rope_is_refused() -> None:
    model = tiny_model("gpt2")
    before = state(model)
    with pytest.raises(ModelError, match="RoPE"):
        views_of(model)
    assert state(model) == before


def test_queries_that_are_normalised_after_rope_are_refused() -> None:
    """They are no rotated vectors: what is before RoPE cannot be told from them."""
    sizes: dict[str, Any] = GROUPED
    config = HunYuanDenseV1Config(**sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with pytest.raises(CaptureError, match=r"layer 0 \(.*its RoPE is followed by something else"):
        views_of(model)


def layouts(model: PreTrainedModel) -> list[list[list[int]]]:
    rotary = [view.rotary for view in views_of(model, IDS[:1])]
    return [[x.tolist() for x in (r.first, r.second, r.unrotated)] for r in rotary]


@every_kind
@pytest.mark.parametrize("value", [0.0, 1e-30, torch.nan, torch.inf])
def test_no_weight_hides_how_a_layer_rotates(kind: str, value: float) -> None:
    """A dead or broken layer is still one of its kind: its code says how it rotates."""
    model = tiny_model(kind)
    for module in attention_modules(model).values():
        for parameter in module.parameters():
            parameter.data.fill_(value)
    assert layouts(model) == layouts(tiny_model(kind))


def test_zeros_in_a_norm_of_queries_hide_nothing() -> None:
    """Weights of -1 in Gemma's norms, which multiply by 1 + w, keep dimensions at zero."""
    model, expected = tiny_model("gemma3"), layouts(tiny_model("gemma3"))
    for module in attention_modules(model).values():
        module.get_parameter("q_norm.weight").data[[0, 3, 8]] = -1
        module.get_parameter("k_norm.weight").data[[0, 3, 8]] = -1
    views = views_of(model, IDS[:1])
    assert not any(view.queries[..., [3, 8]].any() for view in views)  # they turn together
    assert layouts(model) == expected
    for view in views:
        close(view.queries_before, queries_without_rope(model, view.layer)[0])


def test_weights_in_half_precision_hide_nothing_either() -> None:
    model = tiny_model("gemma3").bfloat16()
    for module in attention_modules(model).values():
        module.get_parameter("q_norm.weight").data.fill_(-1)
    assert layouts(model) == layouts(tiny_model("gemma3"))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_learning_a_layout_leaves_the_weights_alone(value: float) -> None:
    model = tiny_model("qwen3")
    model.get_parameter("model.layers.1.self_attn.q_norm.weight").data[0] = value
    before = {name: x.clone() for name, x in model.state_dict().items()}
    views_of(model)
    for name, x in model.state_dict().items():
        torch.testing.assert_close(x, before[name], rtol=0, atol=0, equal_nan=True)


def test_keys_that_turn_otherwise_than_queries_are_refused(monkeypatch: Any) -> None:
    def only_queries(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return rotate(q, k, cos, sin)[0], k

    model = tiny_model("llama")
    source = sys.modules[type(model).__module__]
    rotate = source.apply_rotary_pos_emb
    monkeypatch.setattr(source, "apply_rotary_pos_emb", only_queries)
    with pytest.raises(CaptureError, match=r"layer 0 .* turns queries and keys in different ways"):
        views_of(model)


def test_a_model_that_sees_the_future_is_refused() -> None:
    model = tiny_model("llama")
    model.config.is_causal = False
    with pytest.raises(ModelError, match="causal"):
        views_of(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_layer_that_attends_twice_is_refused() -> None:
    model = tiny_model("llama")
    second: Any = model.get_submodule("model.layers.1.self_attn")
    second.layer_idx = 0
    with pytest.raises(ModelError, match=r"layer 0 .* more than once"):
        views_of(model)
