"""A model is only pruned where what is left runs; else nothing is altered."""

import copy
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tappa.errors import PruningError
from tappa.pruning import Amounts, Plan, apply, remove_kv_groups, remove_layers
from tappa.pruning.trial import obstacle
from tiny import tiny_model

SIZES = {
    "vocab_size": 101,
    "hidden_size": 60,
    "intermediate_size": 64,  # grouped products need rows of 16 bytes
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
# a norm over all heads, of queries and keys, or of the attention's output
SPANNING: dict[str, dict[str, Any]] = {"olmoe": EXPERTS, "olmo2": {}, "olmo3": {}, "bitnet": {}}
IDS = torch.arange(3, 14)[None]


def made(kind: str, **changes: Any) -> Any:
    config = AutoConfig.for_model(kind, **{**SIZES, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def groups(model: Any) -> list[tuple[int, int]]:
    return [(layer, 1) for layer in range(model.config.num_hidden_layers)]


@pytest.mark.parametrize("kind", SPANNING)
def test_kv_groups_stay_where_a_norm_spans_the_heads(kind: str) -> None:
    model = made(kind, **SPANNING[kind])
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    with pytest.raises(PruningError) as caught:
        remove_kv_groups(model, groups(model))
    assert "\n" not in str(caught.value)
    with pytest.raises(PruningError):  # before hours of calibration
        Amounts(kv_groups=1).check(model)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
    assert (
        model.config._experts_implementation
        == made(kind, **SPANNING[kind]).config._experts_implementation
    )
    assert model.config.to_dict() == config


@pytest.mark.parametrize("kind", SPANNING)
def test_layers_of_such_a_model_can_be_removed(kind: str) -> None:
    model: Any = remove_layers(made(kind, **SPANNING[kind]), [1])
    written = model.generate(IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert written.shape == (1, IDS.shape[1] + 4)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("qwen3_moe", EXPERTS | {"moe_intermediate_size": 24, "head_dim": 10}),
        ("mixtral", {"num_local_experts": 4}),
        ("granitemoe", {"num_local_experts": 4}),  # before 5.20 its experts depend on numbers
        ("cohere", {}),
        ("lfm2", {}),
    ],
)
def test_models_that_run_afterwards_are_pruned(kind: str, changes: dict[str, Any]) -> None:
    model: Any = made(kind, **changes)
    remove_kv_groups(model, groups(model))
    config = type(model.config).from_dict(model.config.to_dict())
    plain = AutoModelForCausalLM.from_config(config).eval()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(IDS).logits, model(IDS).logits)


def test_a_plan_that_cannot_be_carried_out_to_its_end_is_not_begun() -> None:
    model = made("bitnet")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for plan in (
        Plan(query_heads=[(0, 1)], kv_groups=groups(model)),
        Plan(query_heads=[(0, 1)], layers=[0, 1, 2]),
    ):
        with pytest.raises(PruningError):
            apply(model, plan)
        after = model.state_dict()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_trial_tells_why_a_config_does_not_run() -> None:
    model = tiny_model("llama", hidden_size=60)
    assert obstacle(model.config, model.config) is None
    broken = type(model.config).from_dict(model.config.to_dict())
    broken.num_key_value_heads = 4  # of 6 query heads
    assert isinstance(obstacle(broken, model.config), RuntimeError)
    assert obstacle(broken, broken) is None  # the whole model fails as well: nothing is told


def test_a_trial_takes_no_memory_for_weights() -> None:
    config = tiny_model("llama").config
    large = type(config).from_dict(
        config.to_dict()
        | {"hidden_size": 6 * 2**14, "intermediate_size": 2**19, "vocab_size": 2**20}
    )
    assert obstacle(large, large) is None
