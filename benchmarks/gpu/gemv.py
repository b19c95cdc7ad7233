"""How fast one vector goes through the weights of Llama-3.1-8B: cuBLAS against a Triton kernel."""

import json
from collections.abc import Callable
from typing import no_type_check

import torch
from llama import gpu, milliseconds
from torch import Tensor
from torch.nn.functional import linear

from tappa.kernels.launching import constexpr, jit, tl

SHAPES = {
    "q, o": (4096, 4096),
    "k, v": (1024, 4096),
    "qkv": (6144, 4096),
    "gate, up": (14336, 4096),
    "gate and up": (28672, 4096),
    "down": (4096, 14336),
    "logits": (128256, 4096),
}


@jit
@no_type_check
def _gemv(w, x, y, rows, columns, ROWS: constexpr, COLUMNS: constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    line = w + row.to(tl.int64)[:, None] * columns + column
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin in range(0, columns, COLUMNS):
        part = tl.load(line + begin, mask=(row < rows)[:, None], other=0.0)
        total += part.to(tl.float32) * tl.load(x + begin + column).to(tl.float32)
    tl.store(y + row, tl.sum(total, 1).to(y.dtype.element_ty), mask=row < rows)


def triton_gemv(
    rows: int, columns: int, warps: int, stages: int
) -> Callable[[Tensor, Tensor], None]:
    """With blocks of a size, in place."""

    def run(w: Tensor, x: Tensor) -> None:
        y = torch.empty(len(w), dtype=w.dtype, device=w.device)
        _gemv[(-(-len(w) // rows),)](
            *(w, x, y, *w.shape), ROWS=rows, COLUMNS=columns, num_warps=warps, num_stages=stages
        )

    return run


def speed(run: Callable[[Tensor, Tensor], object], weights: list[Tensor], x: Tensor) -> float:
    """TB/s over weights that do not fit into the cache together."""
    for w in weights[:2]:
        run(w, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for w in weights:
            run(w, x)
    graph.replay()
    taken = sorted(milliseconds(graph.replay) for _ in range(9))[4]
    return round(sum(w.numel() for w in weights) * 2 / taken / 1e9, 3)


def main() -> None:
    for name, (rows, columns) in SHAPES.items():
        count = max(2, int(1.2e9 // (rows * columns * 2)))
        weights = [
            torch.randn(rows, columns, dtype=torch.bfloat16, device="cuda") for _ in range(count)
        ]
        x = torch.randn(columns, dtype=torch.bfloat16, device="cuda")
        found = {"cublas": speed(lambda w, x: linear(x[None], w), weights, x)}
        for block in (
            (1, 1024, 4, 3),
            (2, 1024, 4, 3),
            (4, 512, 4, 4),
            (4, 1024, 8, 3),
            (8, 512, 8, 3),
            (2, 2048, 8, 2),
        ):
            found[str(block)] = speed(triton_gemv(*block), weights, x)
        print(json.dumps({"benchmark": "gemv", "weights": name, "tb_s": found}), flush=True)
    print(json.dumps(gpu()))


if __name__ == "__main__":
    main()
