"""q-similarity of 32 heads at T = 8192 against the T x T form: time ratio and extra memory."""

import json

import torch
from machine import describe, in_fresh_process, ratios
from torch.nn.functional import normalize

from tappa.similarity import self_similarity

HEADS, TOKENS, DIM = 32, 8192, 64


def quadratic(x: torch.Tensor) -> torch.Tensor:
    """The definition: mean of the T x T cosines off the diagonal, one head at a time."""
    out = []
    for head in normalize(x, dim=-1):
        cosines, steps = head @ head.T, len(head)
        out.append((cosines.sum() - cosines.trace()) / (steps * (steps - 1)))
    return torch.stack(out)


def queries() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(HEADS, TOKENS, DIM, generator=generator).add_(0.5)


def peak_over_input(form: str) -> float:
    """MB that a fresh process needs beyond the queries, once it is warm."""
    return in_fresh_process(
        "import machine, torch, q_similarity as b\n"
        f"x = b.queries(); b.{form}(x[:1, :64])\n"
        f"before = machine.peak_mb(); b.{form}(x); print(machine.peak_mb() - before)"
    )


def main() -> None:
    x = queries()
    difference = float((self_similarity(x) - quadratic(x)).abs().max())
    result = ratios(lambda: quadratic(x), lambda: self_similarity(x), n=5)
    memory = {form: peak_over_input(form) for form in ("self_similarity", "quadratic")}
    what = {"benchmark": "q_similarity", "heads": HEADS, "tokens": TOKENS, "dim": DIM}
    print(json.dumps(what | result | {"extra_mb": memory, "difference": difference} | describe()))


if __name__ == "__main__":
    main()
