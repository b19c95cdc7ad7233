"""Where a kernel cannot serve, figures come out as without it, and a failure is told once."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from kernel_checks import check_sums
from tappa import kernels
from tappa.attention_profile import Attention, attention_profile
from tappa.capture import prefill
from tappa.kernels import launching
from tappa.layer_statistics import PromptLayer, Settings
from tiny import tiny_model


def vectors() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 13, 16), torch.randn(1, 13, 16)


def test_no_kernel_runs_on_a_cpu() -> None:
    assert kernels.autocorrelation_sums(torch.randn(1, 5, 4), 3) is None


def test_no_kernel_runs_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "triton", None)
    assert not launching.runs_on(torch.zeros(1, 1, 1))


def test_a_failure_warns_once_and_the_blocks_take_over(
    on_kernels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import tappa.kernels.profile

    def broken(*_: object) -> None:
        raise RuntimeError("PassManager::run failed\nand a page of text")

    queries, keys = vectors()
    monkeypatch.setattr(tappa.kernels.profile, "profile_sums", broken)
    with pytest.warns(RuntimeWarning, match="kernel attention profile failed.*PassManager") as told:
        first = attention_profile(queries, keys, Attention(0.3), 5)
    assert "page" not in str(told[0].message)
    with warnings.catch_warnings(action="error"):
        second = attention_profile(queries, keys, Attention(0.3), 5)
    monkeypatch.setattr(launching, "runs_on", lambda x: False)
    expected = attention_profile(queries, keys, Attention(0.3), 5)
    assert on_kernels == []
    for profile in (first, second):
        assert torch.equal(profile.column_mass, expected.column_mass)
        assert torch.equal(profile.vertical, expected.vertical)


def test_a_kernel_starts_on_the_device_of_its_tensors(
    on_kernels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not on the current one, whose stream knows nothing of what is written there."""
    x, current = torch.zeros(1), [torch.device("cpu", 0)]

    @contextmanager
    def made_current(tensor: torch.Tensor) -> Iterator[None]:
        assert tensor is x
        current.append(torch.device("cuda", 1))
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", made_current)
    found = launching.choose("test", x, lambda: current[-1], lambda: None)
    assert found == torch.device("cuda", 1)
    assert len(current) == 1


def test_no_memory_is_no_reason_to_go_on(
    on_kernels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import tappa.kernels.profile

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tappa.kernels.profile, "profile_sums", full)
    with pytest.raises(torch.OutOfMemoryError):
        attention_profile(*vectors(), Attention(0.3), 5)
    assert on_kernels == []


@pytest.mark.parametrize("chunk", [None, 17])
def test_all_figures_of_a_layer_are_the_same(
    chunk: int | None, on_kernels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    ids = torch.randint(0, model.config.vocab_size, (1, 43))

    def figures() -> dict[str, torch.Tensor]:
        layer = PromptLayer(Settings(window=8, lags=16))
        prefill(model, ids, lambda view: layer.add(view) if view.layer == 1 else None, chunk=chunk)
        return {n: torch.as_tensor(x) for n, x in layer.statistics().sums.items()}

    with_kernels = figures()
    assert set(on_kernels) == {
        *("attention profile", "similarity", "autocorrelation", "unit vectors", "query sums"),
    }
    monkeypatch.setattr(launching, "runs_on", lambda x: False)
    check_sums(with_kernels, figures())
