"""Products of few vectors: the kernel against the formula, and which linear layers it serves."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from tappa.compression import compressed, generate
from tappa.kernels import gemv, launching
from tappa.kernels.gemv import MOST, FewVectors, Tiles, gemv_reference, gemv_triton
from tiny import tiny_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def made(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the weights that the kernel was given, which here runs on a CPU too."""
    shapes: list[tuple[int, ...]] = []
    plain = gemv.gemv_triton

    def noted(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        shapes.append(tuple(weight.shape))
        return plain(x, weight, bias)

    monkeypatch.setattr(gemv, "gemv_triton", noted)
    monkeypatch.setattr(launching, "runs_on", lambda x: True)
    monkeypatch.setattr(launching, "FAILED", set())
    return shapes


@pytest.mark.parametrize("tiles", [None, Tiles(4, 32, 2), Tiles(2, 16, 1)])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (7, 13), (5, 64), (19, 131), (3, 2051)])
@pytest.mark.parametrize("vectors", [1, 2])
def test_against_the_formula(
    vectors: int, outputs: int, inputs: int, tiles: Tiles | None, poison: None
) -> None:
    x, weight, bias = made(vectors, inputs), made(outputs, inputs), made(outputs)
    exact = x.double() @ weight.double().T
    for given, wanted in ((None, exact), (bias, exact + bias)):
        for found in (gemv_reference(x, weight, given), gemv_triton(x, weight, given, tiles)):
            torch.testing.assert_close(found.double(), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_not_rounded_on_the_way(dtype: torch.dtype) -> None:
    """Of 4099 numbers 1/8, where a sum in bfloat16 would end at 32."""
    x, weight = torch.ones(1, 4099, dtype=dtype, device=DEVICE), made(3, 4099, dtype=dtype)
    weight[:] = 0.125
    assert gemv_triton(x, weight).tolist() == [[float(torch.tensor(512.375).to(dtype))] * 3]


def test_rows_of_a_wider_matrix() -> None:
    wide = made(11, 37)
    wide[:, 20:] = torch.nan
    x = made(1, 20)
    torch.testing.assert_close(gemv_triton(x, wide[:, :20]), x @ wide[:, :20].T)


class Kind(Tensor):
    """A tensor that may hold its numbers in another way."""


@pytest.mark.parametrize(
    "case", ["vectors", "float32", "made", "kind", "mixed", "transposed", "empty", "keywords"]
)
def test_other_layers_are_left_alone(case: str, ran: list[Any]) -> None:
    x, weight = made(1, 8, dtype=torch.bfloat16), nn.Parameter(made(4, 8, dtype=torch.bfloat16))
    given: dict[str, tuple[Tensor, Tensor]] = {
        "vectors": (made(MOST + 1, 8, dtype=torch.bfloat16), weight),
        "float32": (x.float(), nn.Parameter(weight.detach().float())),
        "made": (x, weight.detach() * 2),  # as a layer of quantized numbers does
        "kind": (x, nn.Parameter(weight.detach().as_subclass(Kind))),  # as torchao's weights
        "mixed": (x, nn.Parameter(weight.detach().half())),
        "transposed": (x, nn.Parameter(weight.detach().T.contiguous().T)),
        "empty": (x[:0], weight),
        "keywords": (x, weight),
    }
    with torch.no_grad(), FewVectors():
        if case == "mixed":
            with pytest.raises(RuntimeError):
                linear(*given[case])
        elif case == "keywords":
            linear(x, weight=weight)
        else:
            linear(*given[case])
    assert ran == []


def test_a_layer_with_hooks_and_the_end_of_the_mode(ran: list[Any]) -> None:
    layer, seen = nn.Linear(8, 4, device=DEVICE, dtype=torch.bfloat16), []
    layer.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    x = made(1, 1, 8, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = layer(x)
        with FewVectors():
            found = layer(x)
        layer(x)
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)
    assert seen == [(1, 1, 4)] * 3
    assert ran == [(4, 8)]


def test_a_failure_warns_once_and_goes_on(ran: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no such launch")

    monkeypatch.setattr(gemv, "gemv_triton", broken)
    x, weight, bias = (made(*s, dtype=torch.bfloat16) for s in ((1, 8), (4, 8), (4,)))
    with pytest.warns(RuntimeWarning, match="kernel gemv failed.*no such launch"):
        first = gemv.gemv(x, weight, bias)
    assert torch.equal(first, linear(x, weight, bias))
    assert torch.equal(gemv.gemv(x[0], weight, bias), first[0])


@pytest.mark.parametrize("compiled", [False, True])
def test_fixed_steps_of_a_model_use_it(
    compiled: bool, ran: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16: every linear layer of every step, and nothing while the prompt is read."""
    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **o: plain(f, backend="aot_eager", **o))
    monkeypatch.setattr(launching, "FAILED", {"ragged_decode", "window_sums", "unit_query_sums"})
    monkeypatch.setattr(gemv, "FASTEST", {1: Tiles(32, 64, 2)})  # fewer programs to interpret
    model: Any = tiny_model("llama")
    model.to(DEVICE, torch.bfloat16)
    model.generation_config.eos_token_id = None
    ids = torch.arange(3, 40, device=DEVICE)[None]
    layers = sum(type(module) is nn.Linear for module in model.modules())
    cache = compressed(model, "tappa", 23, window=7, every=5)
    found = generate(cache, ids, 6, graph=True, compiled=compiled)
    assert found.shape == (1, 37 + 6)
    on_graph = 3 if DEVICE == "cuda" else 5  # two steps to warm up and one that is recorded
    assert len(ran) == layers * on_graph
    assert (101, 42) in ran  # the logits
