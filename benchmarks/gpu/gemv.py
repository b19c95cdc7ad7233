"""How fast a vector goes through the weights of Llama-3.1-8B: cuBLAS against Triton kernels.

Weights lie in one buffer of 16 GB and rotate, so that no cache holds them. `--small` tries the
kernels on small matrices, which also works on a CPU under TRITON_INTERPRET=1.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any, no_type_check

import torch
import triton
from llama import gpu, milliseconds
from torch import Tensor
from torch.nn.functional import linear

from tappa.kernels.gemv import Tiles, gemv_triton
from tappa.kernels.launching import constexpr, jit, power_of_two, tl

Product = Callable[[Tensor, Tensor], Tensor]  # x (vectors, inputs), weight -> (vectors, outputs)
LAYER = {"q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096)}
LAYER |= {"gate": (14336, 4096), "up": (14336, 4096), "down": (4096, 14336)}
JOINED = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
LOGITS = {"logits": (128256, 4096)}
LAYERS = 32


def ours(outputs: int, inputs: int, warps: int, early: bool) -> Product:
    """`early`: launched while the kernel before it still runs (sm_90 and later)."""
    tiles = Tiles(outputs, inputs, warps)
    return lambda x, w: gemv_triton(x, w, None, tiles, early)


@jit
@no_type_check
def _persistent(
    x, w, out, outputs, inputs, OUTPUTS: constexpr, INPUTS: constexpr, STAGES: constexpr
):
    """One loop over all blocks of a program's tiles, so that loads never pause between tiles."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    row, column = tl.arange(0, OUTPUTS), tl.arange(0, INPUTS)
    blocks = inputs // INPUTS
    tiles = tl.cdiv(tl.cdiv(outputs, OUTPUTS) - program, programs)
    total = tl.zeros((OUTPUTS, INPUTS), tl.float32)
    for i in tl.range(0, tiles * blocks, num_stages=STAGES):
        output = (program + i // blocks * programs) * OUTPUTS + row
        at = i % blocks * INPUTS + column
        line = w + output.to(tl.int64)[:, None] * inputs + at
        part = tl.load(line, mask=(output < outputs)[:, None], other=0.0)
        total += part.to(tl.float32) * tl.load(x + at).to(tl.float32)
        if i % blocks == blocks - 1:
            done = tl.sum(total, 1).to(out.dtype.element_ty)
            tl.store(out + output, done, mask=output < outputs)
            total = tl.zeros((OUTPUTS, INPUTS), tl.float32)


def persistent(outputs: int, inputs: int, warps: int, stages: int, each: int) -> Product:
    """`each`: programs of a multiprocessor."""

    def run(x: Tensor, w: Tensor) -> Tensor:
        out = torch.empty(1, len(w), dtype=w.dtype, device=w.device)
        cores = 3 if not w.is_cuda else torch.cuda.get_device_properties(0).multi_processor_count
        _persistent[(min(each * cores, -(-len(w) // outputs)),)](
            *(x, w, out, *w.shape), OUTPUTS=outputs, INPUTS=inputs, STAGES=stages, num_warps=warps
        )
        return out

    return run


@jit
@no_type_check
def _by_dot(
    x, w, out, vectors, outputs, inputs,
    VECTORS: constexpr, OUTPUTS: constexpr, INPUTS: constexpr, STAGES: constexpr,
):  # fmt: skip
    """On tensor cores, vectors padded to 16."""
    vector = tl.arange(0, VECTORS)
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    column = tl.arange(0, INPUTS)
    line = w + output.to(tl.int64)[:, None] * inputs + column
    given = x + vector[None, :] * inputs + column[:, None]
    total = tl.zeros((OUTPUTS, VECTORS), tl.float32)
    for begin in tl.range(0, inputs, INPUTS, num_stages=STAGES):
        part = tl.load(line + begin, mask=(output < outputs)[:, None], other=0.0)
        value = tl.load(given + begin, mask=(vector < vectors)[None, :], other=0.0)
        total = tl.dot(part, value, total)
    place = vector[None, :] * outputs + output[:, None]
    inside = (vector < vectors)[None, :] & (output < outputs)[:, None]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


def by_dot(outputs: int, inputs: int, warps: int, stages: int) -> Product:
    def run(x: Tensor, w: Tensor) -> Tensor:
        out = torch.empty(len(x), len(w), dtype=w.dtype, device=w.device)
        _by_dot[(-(-len(w) // outputs),)](
            *(x, w, out, len(x), *w.shape),
            VECTORS=power_of_two(len(x)), OUTPUTS=outputs, INPUTS=inputs, STAGES=stages,
            num_warps=warps,
        )  # fmt: skip
        return out

    return run


@jit
@no_type_check
def _by_tma(x, w, out, outputs, inputs, OUTPUTS: constexpr, INPUTS: constexpr, STAGES: constexpr):
    """Blocks come through the bulk copy engine."""
    first = tl.program_id(0) * OUTPUTS
    column = tl.arange(0, INPUTS)
    total = tl.zeros((OUTPUTS, INPUTS), tl.float32)
    for begin in tl.range(0, inputs, INPUTS, num_stages=STAGES):
        part = w.load([first, begin])
        total += part.to(tl.float32) * tl.load(x + begin + column).to(tl.float32)
    output = first + tl.arange(0, OUTPUTS)
    tl.store(out + output, tl.sum(total, 1).to(out.dtype.element_ty), mask=output < outputs)


def by_tma(outputs: int, inputs: int, warps: int, stages: int) -> Product:
    from triton.tools.tensor_descriptor import TensorDescriptor

    def run(x: Tensor, w: Tensor) -> Tensor:
        out = torch.empty(1, len(w), dtype=w.dtype, device=w.device)
        _by_tma[(-(-len(w) // outputs),)](
            *(x, TensorDescriptor.from_tensor(w, [outputs, inputs]), out, *w.shape),
            OUTPUTS=outputs, INPUTS=inputs, STAGES=stages, num_warps=warps,
        )  # fmt: skip
        return out

    return run


def designs() -> dict[str, Product]:
    """Name and numbers of each: outputs, inputs of a tile, warps, stages, ..."""
    rows = [(1, 1024, 4), (2, 1024, 4), (4, 1024, 4), (1, 2048, 4), (2, 2048, 8), (1, 4096, 4)]
    rows += [(1, 2048, 8), (2, 1024, 8), (2, 512, 4)]
    flat = [(4, 1024, 4, 4, 4), (2, 2048, 4, 4, 3), (8, 1024, 8, 4, 2), (4, 2048, 8, 3, 3)]
    dots = [(16, 512, 4, 3), (16, 256, 4, 5), (32, 256, 4, 4), (64, 128, 4, 5)]
    bulk = [(8, 256, 4, 5), (16, 256, 4, 5), (32, 256, 8, 4)]
    found: dict[str, Product] = {"cublas": lambda x, w: linear(x, w)}
    found |= {f"ours {x}": ours(*x, early=True) for x in rows}
    found |= {f"late {x}": ours(*x, early=False) for x in rows[:4]}
    found |= {f"persistent {x}": persistent(*x) for x in flat}
    found |= {f"dot {x}": by_dot(*x) for x in dots}
    return found | {f"tma {x}": by_tma(*x) for x in bulk}


def error_of(run: Product, vectors: int, device: str, size: tuple[int, int]) -> float:
    """Largest difference to float32, over the largest number."""
    x = torch.randn(vectors, size[1], dtype=torch.bfloat16, device=device)
    w = torch.randn(*size, dtype=torch.bfloat16, device=device)
    exact = linear(x.float(), w.float())
    return round(float((run(x, w).float() - exact).abs().max() / exact.abs().max()), 5)


def works(run: Product, vectors: int, device: str, size: tuple[int, int]) -> str | None:
    """What is wrong with a product, None if nothing is."""
    try:
        error = error_of(run, vectors, device, size)
    except Exception as caught:  # whatever a compiler says
        return f"{type(caught).__name__}: {(str(caught).splitlines() or [''])[0][:90]}"
    return None if error < 0.02 else f"error {error}"


class Weights:
    """Matrices of any shape, one after the other out of one buffer."""

    def __init__(self) -> None:
        self.buffer = torch.empty(8_000_000_000, dtype=torch.bfloat16, device="cuda")
        for part in self.buffer.split(2**30):
            part.normal_()
        self.at = 0

    def take(self, rows: int, columns: int) -> Tensor:
        if self.at + rows * columns > len(self.buffer):
            self.at = 0
        self.at += rows * columns
        return self.buffer[self.at - rows * columns : self.at].view(rows, columns)

    def read(self) -> float:
        """TB/s of a sum over a part that no cache holds."""
        part = self.buffer[: 2**31].view(torch.int16).view(torch.int32)
        part.amax()
        return part.numel() * 4 / min(milliseconds(part.amax) for _ in range(7)) / 1e9

    def copied(self) -> float:
        """TB/s read and written."""
        a, b = self.buffer[: 2**30], self.buffer[2**30 : 2**31]
        b.copy_(a)
        return 4 * len(a) / min(milliseconds(lambda: b.copy_(a)) for _ in range(7)) / 1e9


def captured(run: Callable[[], object]) -> float:
    """Milliseconds of something as a CUDA graph, the median of nine."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    return statistics.median(milliseconds(graph.replay) for _ in range(9))


def speed(run: Product, weights: Weights, shape: tuple[int, int], vectors: int) -> float:
    """TB/s at which about 1.2 GB of weights are read."""
    count = max(2, int(1.2e9 // (shape[0] * shape[1] * 2)))
    matrices = [weights.take(*shape) for _ in range(count)]
    x = torch.randn(vectors, shape[1], dtype=torch.bfloat16, device="cuda")
    run(x, matrices[0])
    taken = captured(lambda: [run(x, w) for w in matrices])
    return round(count * shape[0] * shape[1] * 2 / taken / 1e9, 3)


def step(weights: Weights, by: dict[str, Product], layer: dict[str, Any], between: bool) -> float:
    """Milliseconds of all products of a step; `between`: a small operation before each of them."""
    weights.at = 0
    matrices = [
        (name, weights.take(*shape)) for _ in range(LAYERS) for name, shape in layer.items()
    ]
    matrices += [(name, weights.take(*shape)) for name, shape in LOGITS.items()]
    x = {n: torch.randn(1, n, dtype=torch.bfloat16, device="cuda") for n in (4096, 14336)}

    def run() -> None:
        for name, w in matrices:
            given = x[w.shape[1]]
            if between:
                given.neg_()
            by[name](given, w)

    run()
    return round(captured(run), 4)


def measure() -> dict[str, Any]:
    """All designs on all shapes, then the whole step with the best ones."""
    start = time.perf_counter()
    known = designs()
    faults = {name: works(run, 1, "cuda", (4096, 4096)) for name, run in known.items()}
    known = {name: run for name, run in known.items() if faults[name] is None}
    compiled = time.perf_counter() - start
    weights = Weights()
    shapes = {"q, o": LAYER["q"], "k, v": LAYER["k"], "qkv": JOINED["qkv"], "gate, up": LAYER["up"]}
    shapes |= {"gate_up": JOINED["gate_up"], "down": LAYER["down"]} | LOGITS
    found = {
        shape: {name: speed(run, weights, size, 1) for name, run in known.items()}
        for shape, size in shapes.items()
    }
    several = {
        f"{name}, {vectors} vectors": {
            shape: speed(known[name], weights, LAYER[shape], vectors) for shape in ("up", "down")
        }
        for vectors in (2, 4)
        for name in known
        if name.startswith(("cublas", "ours", "dot"))
    }
    read, copied = weights.read(), weights.copied()
    total = sum(a * b * 2 for a, b in [*LAYER.values()] * LAYERS + [*LOGITS.values()])
    return {
        "benchmark": "gemv",
        "read_tb_s": round(read, 3),
        "copy_tb_s": round(copied, 3),
        "step_gb": round(total / 1e9, 3),
        "bound_ms": round(total / copied / 1e9, 3),
        "faults": {name: fault for name, fault in faults.items() if fault},
        "tb_s": found,
        "several": several,
        "step_ms": steps(weights, known, found),
        "compile_s": round(compiled, 1),
        "seconds": round(time.perf_counter() - start, 1),
    }


def steps(
    weights: Weights, known: dict[str, Product], found: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """Of cuBLAS, of the design that is best over all, and of the best of each kind by shape."""
    of = {"q": "q, o", "o": "q, o", "k": "k, v", "v": "k, v", "gate": "gate, up", "up": "gate, up"}
    result: dict[str, Any] = {}
    for kind in dict.fromkeys(name.split(" ")[0] for name in known):
        mine = [name for name in known if name.split(" ")[0] == kind]
        for layer, form in ((LAYER, "apart"), (JOINED, "joined")):
            best = {}
            for name in [*layer, *LOGITS]:
                speeds = found[of.get(name, name)]
                best[name] = max(mine, key=lambda one, speeds=speeds: speeds[one])
            by = {name: known[one] for name, one in best.items()}
            times = [step(weights, by, layer, between) for between in (False, True)]
            result[f"{kind}, {form}"] = {"alone": times[0], "with neg_": times[1], "best": best}
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true")
    if parser.parse_args().small:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        for name, run in designs().items():
            inputs = int(name.split("(")[1].split(", ")[1]) * 3 if "(" in name else 64
            print(name, works(run, 1, device, (37, inputs)))
        return
    with torch.inference_mode():
        print(json.dumps(measure() | {"triton": triton.__version__} | gpu()))


if __name__ == "__main__":
    main()
