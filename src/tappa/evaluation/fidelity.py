"""How far a compressed cache leads the model astray, token by token, on real text."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tappa.compression import CompressedCache
from tappa.errors import EvaluationError
from tappa.evaluation.harness import continuation_logits
from tappa.hooks import add_hook, of_this_thread, remove_all

LARGE = 8_000_000  # characters: tokenizing more takes longer than answering a few samples
NEXT = 64  # tokens that follow the context


def windows(ids: Sequence[int], tokens: int, count: int, seed: int = 0) -> list[list[int]]:
    """`count` windows of `tokens` that start anywhere in a text; the same for the same seed.

    Those of even number lie in the first half of the text, those of odd number in the second: what
    is chosen on one half can be judged on the other. Raises EvaluationError for too short a text.
    """
    middle = len(ids) // 2
    if middle <= tokens:
        raise EvaluationError(
            f"expected a text of more than {2 * tokens} tokens for windows of {tokens}, "
            f"got {len(ids)}"
        )
    found = []
    for number in range(count):
        low, high = (0, middle) if number % 2 == 0 else (middle, len(ids))
        start = random.Random(f"{seed}/{number}").randrange(low, high - tokens)
        found.append(list(ids[start : start + tokens]))
    return found


def windows_of_text(
    text: str, encode: Callable[[str], list[int]], tokens: int, count: int, seed: int = 0
) -> list[list[int]]:
    """`windows` of a text. One of more than LARGE characters is not tokenized as a whole.

    Its windows start at the first word after a random character, likewise in either half. Raises
    EvaluationError for too short a text.
    """
    if len(text) <= LARGE:
        return windows(encode(text), tokens, count, seed)
    found = []
    for number in range(count):
        half = len(text) // 2
        begin, end = (0, half) if number % 2 == 0 else (half, 2 * half)
        room = max(half - 16 * tokens, 1)  # characters of a token, hardly ever more
        start = begin + random.Random(f"{seed}/{number}").randrange(room)
        found.append(_from_word(text, encode, start, end, tokens))
    return found


def _from_word(
    text: str, encode: Callable[[str], list[int]], start: int, end: int, tokens: int
) -> list[int]:
    """The first `tokens` tokens from the first space of `text[start:end]` on."""
    start = max(start, text.find(" ", start, start + 1000))  # some languages have none
    size = 8 * tokens
    while True:
        ids = encode(text[start : min(start + size, end)])
        if len(ids) >= tokens + 8 or (len(ids) >= tokens and start + size >= end):
            return ids[:tokens]
        if start + size >= end:
            raise EvaluationError(f"expected {tokens} tokens in half of the text, got {len(ids)}")
        size *= 2


class Reference:
    """What the full cache says of the tokens that follow a context."""

    def __init__(self, full: CompressedCache, last: int, following: Sequence[int]) -> None:
        self.last, self.following = last, list(following)
        logits, outputs = self._run(full, 1)
        self.logits, self.outputs = logits[0].float().log_softmax(-1), [x[0] for x in outputs]

    def compare(self, cache: CompressedCache, rows: int = 1) -> list[dict[str, Any]]:
        """Of each row of a compressed cache against the full one, means over following tokens.

        - `kl`: divergence `sum p_full (log p_full - log p)` in nats
        - `top1`: how often both have the same most probable token
        - `nll`: -log p of the true token
        - `attention_error`: mean over layers of `|o - o_full| / |o_full|`, o the output of the
          attention module; `layers` has it for each layer
        """
        logits, outputs = self._run(cache, rows)
        return [
            self._compare_row(logits[row].float().log_softmax(-1), [x[row] for x in outputs])
            for row in range(rows)
        ]

    def _compare_row(
        self, logits: Float[Tensor, "new vocabulary"], outputs: list[Tensor]
    ) -> dict[str, Any]:
        targets = torch.tensor(self.following, device=logits.device)[:, None]
        kl = (self.logits.exp() * (self.logits - logits)).sum(-1)
        same = logits.argmax(-1) == self.logits.argmax(-1)
        layers = [
            float((a - b).norm() / b.norm().clamp_min(1e-30))
            for a, b in zip(outputs, self.outputs, strict=True)
        ]
        return {
            "kl": float(kl.mean()),
            "top1": float(same.float().mean()),
            "nll": -float(logits.gather(1, targets).mean()),
            "attention_error": sum(layers) / len(layers),
            "layers": layers,
        }

    def _run(
        self, cache: CompressedCache, rows: int
    ) -> tuple[Float[Tensor, "rows new vocabulary"], list[Tensor]]:
        with attention_outputs(cache.model) as outputs:
            logits = continuation_logits(cache, self.last, self.following, rows)
        return logits, outputs


@contextmanager
def attention_outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """The outputs of all attention modules, in the order of the layers, of one forward pass."""
    outputs: list[Tensor] = []

    @of_this_thread
    def see(module: nn.Module, args: tuple, output: Any) -> None:
        outputs.append((output[0] if isinstance(output, tuple) else output).float())

    attention = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "head_dim")]
    handles = [add_hook(module.register_forward_hook, see) for module in attention]
    try:
        yield outputs
    finally:
        remove_all(handles)
