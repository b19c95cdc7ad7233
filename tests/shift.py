"""The machine that rounds another way, on this one: `TAPPA_TEST_SHIFT=1e-5` for a run of tests.

Every number by which something is chosen (a model's logits, the scores of tokens, preferences for
budgets) is moved at random by up to that share of its size, anew each time. A test that fails then
compares what two computations choose at a near tie, or claims that they are the same to the bit:
mark the latter `same_kernel`, which skips it when numbers are shifted.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tappa.compression import cache, eviction, layer

NUMBERS = torch.Generator().manual_seed(0)
SHIFT = [0.0]


def shifted(x: Tensor) -> Tensor:
    """Each number moved by up to SHIFT of its size, equal ones alike (a maximum of neighbours)."""
    far = 1e9 * x.double() / x.double().abs().max().clamp_min(1e-300)
    phase = 7 * torch.rand((), generator=NUMBERS).to(x.device)
    return (x * (1 + SHIFT[0] * torch.sin(far + phase))).to(x.dtype)


def _shifted_output(module: Any, arguments: Any, output: Tensor) -> Tensor:
    return shifted(output) if output.device.type == "cpu" else output


def shift_all(size: float) -> None:
    """From here on, in this process: on the CPU, all models made from now on."""
    SHIFT[0] = size
    made, allocate = PreTrainedModel.post_init, cache.allocate  # type: ignore[attr-defined]

    def post_init(self: PreTrainedModel) -> None:
        made(self)
        head = self.get_output_embeddings()
        if head is not None and _shifted_output not in head._forward_hooks.values():
            head.register_forward_hook(_shifted_output)

    def of_shifted(ranks: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda scores, *rest: ranks(shifted(scores), *rest)

    def shifted_allocate(rule: Any, preference: Any, *sizes: Any) -> Any:
        computed = rule.needs  # and no constants
        return allocate(rule, shifted(torch.tensor(preference)) if computed else preference, *sizes)

    PreTrainedModel.post_init = post_init  # type: ignore[method-assign]
    cache.allocate = shifted_allocate  # type: ignore[assignment, attr-defined]
    for module in (layer, eviction):
        for name in ("head_ranks", "pooled_ranks", "ranks_within", "ranks_shared"):
            if name in vars(module):
                setattr(module, name, of_shifted(vars(module)[name]))
