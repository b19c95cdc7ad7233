"""One module with random numbers in place of all that its weights would give."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tappa.hooks import add_hook, of_this_thread, remove_all


class WithoutWeights:
    """While entered, every submodule returns random numbers in the shape of its output.

    So it does in the thread that has entered; others get what the module gives.

    What a module's code does, the rotation of queries for example, can be hidden by its weights: a
    zero in a norm keeps a dimension at zero, a dead projection keeps all of them there. No weight
    is touched, so that it does not matter how they are stored (quantised, split, offloaded, LoRA).

    A submodule that is given NaN keeps its own output from then on: what follows the NaN that a
    caller has put in is seen as it is.

        with WithoutWeights(attention) as random:
            random.restart(seed=1)
            attention(hidden_states, position_embeddings=tables)
    """

    def __init__(self, module: nn.Module) -> None:
        self.leaves = [m for m in module.modules() if not any(True for _ in m.children())]
        self._reached: set[nn.Module] = set()
        self.generator = torch.Generator()  # of the random numbers
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> "WithoutWeights":
        hook = of_this_thread(self._replace)
        self._hooks = [
            add_hook(m.register_forward_hook, hook, with_kwargs=True) for m in self.leaves
        ]
        return self

    def __exit__(self, *_: object) -> None:
        remove_all(self._hooks)

    def restart(self, seed: int) -> None:
        """From here on the same numbers as after any other `restart` with this seed."""
        self.generator.manual_seed(seed)

    def _replace(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Tensor | None:
        if any(_has_nan(x) for x in _tensors((args, kwargs))):
            self._reached.add(module)
        plain = isinstance(output, Tensor) and not hasattr(output, "to_local")
        if module in self._reached or not plain or not output.is_floating_point():
            return None
        return torch.randn(output.shape, generator=self.generator).to(output)


def _has_nan(x: Tensor) -> bool:
    return x.is_floating_point() and bool(x.isnan().any())


def _tensors(nested: Any) -> Iterator[Tensor]:
    """The tensors in tuples, lists and dictionaries."""
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, (tuple, list)):
        for one in nested:
            yield from _tensors(one)
    elif isinstance(nested, dict):
        yield from _tensors(list(nested.values()))
