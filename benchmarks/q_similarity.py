"""q-similarity of 32 heads at T = 8192 against the T x T form: time ratio and extra memory."""

import json
import subprocess
import sys

import torch
from machine import describe, ratios
from torch.nn.functional import normalize

from tappa.similarity import self_similarity

HEADS, TOKENS, DIM = 32, 8192, 64


def quadratic(x: torch.Tensor) -> torch.Tensor:
    """The definition: mean of the T x T cosines off the diagonal, one head at a time."""
    out = []
    for head in normalize(x, dim=-1):
        cosines = head @ head.T
        out.append((cosines.sum() - cosines.trace()) / (TOKENS * (TOKENS - 1)))
    return torch.stack(out)


def queries() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(HEADS, TOKENS, DIM, generator=generator) + 0.5


def peak_over_input(form: str) -> float:
    """MB that a fresh process needs beyond the queries (peak resident size, before and after)."""
    code = (
        "import resource, torch, q_similarity as b\n"
        "x = b.queries(); b.self_similarity(x[:1, :64]); b.quadratic(x[:1, :64])\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"before = peak(); b.{form}(x); print((peak() - before) / 1024)"
    )
    code = code.replace("b.quadratic(x[:1, :64])", "torch.mm(x[0, :64], x[0, :64].T)")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=sys.path[0], capture_output=True, text=True, check=True
    )
    return round(float(done.stdout), 1)


def main() -> None:
    x = queries()
    difference = float((self_similarity(x) - quadratic(x)).abs().max())
    result = ratios(lambda: quadratic(x), lambda: self_similarity(x), n=5)
    memory = {form: peak_over_input(form) for form in ("self_similarity", "quadratic")}
    what = {"benchmark": "q_similarity", "heads": HEADS, "tokens": TOKENS, "dim": DIM}
    print(json.dumps(what | result | {"extra_mb": memory, "difference": difference} | describe()))


if __name__ == "__main__":
    main()
