"""Decoding on a GPU: the time of a step on compressed and full caches, and the largest batch.

Caches are made up: random keys and values, as many as there would be after a prompt of 128k tokens.
`--curves FILE` writes how a step's time grows, for `runs/cost_curves.py`, and does nothing else.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from llama import gpu, kernels, llama, milliseconds, spread
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

import tappa
from tappa.attention_profile import Attention
from tappa.compression import CompressedCache, generate
from tappa.compression.decoder import Decoder, FixedReader
from tappa.compression.fixed import FixedKV, attend
from tappa.compression.observation import Observation
from tappa.compression.stepping import FixedSteps
from tappa.compression.storage import RaggedKV
from tappa.interface import AttentionSwitch
from tappa.kernels.launching import FAILED
from tappa.kernels.ragged_decode import ragged_decode

SEEN, BUDGET, KV_HEADS, DIM = 131072, 1024, 8, 128
STEPS = 16  # of one measurement


class SdpaKV(FixedKV):
    """The full cache as PyTorch's own attention wants it: (rows, heads, tokens, dim), no mask."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, attention: Attention
    ) -> Tensor:
        size = len(self.keys) // self.layer_count
        place = torch.full((1,), self.seen, device=key.device)  # the same each time
        found = []
        for buffer, new in ((self.keys, key), (self.values, value)):
            own = buffer[layer * size : (layer + 1) * size].view(self.rows, KV_HEADS, -1, DIM)
            own.index_copy_(2, place, new)
            found.append(own[:, :, : self.seen + 1])
        out = scaled_dot_product_attention(query, *found, enable_gqa=True, scale=attention.scale)
        return out.transpose(1, 2)


def alike(layers: int, rows: int, tokens: int) -> Tensor:
    """Every head of every layer holds as much."""
    return torch.full((layers, rows, KV_HEADS), tokens)


def unlike(layers: int, rows: int, tokens: int) -> Tensor:
    """As `tappa` shares: layers by preference, heads by score with a fifth of an equal share."""
    generator = torch.Generator().manual_seed(0)
    layer = torch.softmax(0.5 * torch.randn(layers, rows, 1, generator=generator), 0)
    head = torch.softmax(torch.randn(layers, rows, KV_HEADS, generator=generator), 2)
    shares = layer * (0.2 / KV_HEADS + 0.8 * head)
    return (shares * tokens * layers * KV_HEADS).long().clamp_min(32)


def filled(lengths: Tensor, room: int, kind: type[FixedKV] = FixedKV, seen: int = SEEN) -> FixedKV:
    """Random keys and values."""
    like = RaggedKV.of(*torch.zeros(2, 1, KV_HEADS, 1, DIM, dtype=torch.bfloat16, device="cuda"),
                       torch.zeros(1, dtype=torch.int64, device="cuda"))  # fmt: skip
    fixed = kind(lengths, room, like, seen)
    fixed.keys.normal_()
    fixed.values.normal_()
    return fixed


def ready(model: PreTrainedModel, fixed: FixedKV, compiled: bool, graph: bool = True) -> Callable:
    """A function that runs so many steps."""
    rows = fixed.rows
    last = torch.randint(0, 1000, (rows,), device="cuda")
    decoder = Decoder(last, torch.full_like(last, fixed.seen), 4096)
    switch = AttentionSwitch(model, attend)
    reader = FixedReader(model, fixed, switch, compiled)
    if graph:
        decoder.capture(reader)
        assert decoder.graph is not None
    start = [x.clone() for x in (fixed.lengths, fixed.now, decoder.count)]

    def run(steps: int) -> None:
        for x, old in zip((fixed.lengths, fixed.now, decoder.count), start, strict=True):
            x.copy_(old)
        decoder.run(reader, steps)

    return run


def step_ms(run: Callable[[int], object], steps: int = STEPS, n: int = 7) -> dict[str, Any]:
    """Of one step, n times over so many steps in a row."""
    run(steps)
    return spread([milliseconds(lambda: run(steps)) / steps for _ in range(n)])


def bandwidth() -> float:
    """Bytes read and written in a second by a large copy, TB/s."""
    a = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_()
    b = torch.empty_like(a)
    b.copy_(a)
    return 2 * len(a) / min(milliseconds(lambda: b.copy_(a)) for _ in range(10)) / 1e9


def weight_bytes(model: PreTrainedModel) -> int:
    """What a step must read of the model: all but the table of embeddings."""
    left_out = {id(model.get_input_embeddings().weight)}
    return sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in left_out)


def made_up(model: PreTrainedModel, method: str, lengths: Tensor) -> CompressedCache:
    """A cache as after a prompt of SEEN tokens."""
    cache = tappa.compressed(model, method, BUDGET)
    rows = lengths.shape[1]
    for layer, counts in zip(cache.compressed_layers, lengths.flatten(1).tolist(), strict=True):
        total = sum(counts)
        keys, values = torch.randn(2, total, DIM, dtype=torch.bfloat16, device="cuda")
        positions = [torch.arange(SEEN - n, SEEN, dtype=torch.int32) for n in counts]
        figures = {"position": torch.cat(positions).cuda()}
        layer.held, layer.seen, layer.complete = (
            RaggedKV(keys, values, counts, KV_HEADS, figures), SEEN, False,
        )  # fmt: skip
        layer.attention, layer.is_initialized = Attention(DIM**-0.5), True
        at = torch.arange(SEEN - 32, SEEN, device="cuda")
        window = torch.randn(32, 32, DIM, dtype=torch.bfloat16, device="cuda")
        layer.observations = [Observation(window, at, 0, SEEN, SEEN) for _ in range(rows)]
        shares = lengths.double()
        layer.preferences = [shares[layer.index, row].tolist() for row in range(rows)]
    return cache


def with_cuts(model: PreTrainedModel, lengths: Tensor, compiled: bool, periods: int = 6) -> dict:
    """Time of a step while the budget is kept: 16 steps and a cut, again and again."""
    cache = made_up(model, "tappa", lengths)
    rows = lengths.shape[1]
    last = torch.randint(0, 1000, (rows,), device="cuda")
    decoder = Decoder(last, torch.full_like(last, SEEN), 4096)
    steps = FixedSteps(cache, decoder, 4096, compiled)

    def period() -> None:
        size = steps.room()
        assert size == STEPS, size
        steps.run(size)
        bool(decoder.finished.all())

    period()
    return spread([milliseconds(period) / STEPS for _ in range(periods)])


def check(compiled: bool) -> None:
    """Fixed steps, as a graph and compiled, write what plain steps do; in float32, on 4 layers."""
    model = llama(4, torch.float32)
    ids = torch.randint(0, 1000, (2, 700), device="cuda")
    mask = torch.ones_like(ids)
    mask[0, :100] = 0
    for method in ("tappa",) if compiled else ("tappa", "snapkv", "full"):
        found = []
        for graph, fused in ((False, False), (True, False), *[(True, True)] * compiled):
            cache = tappa.compressed(model, method, 128)
            made = generate(cache, ids, 70, attention_mask=mask, graph=graph, compiled=fused)
            found.append((made, [cache.positions_held(n, 3, 1) for n in range(4)]))
        same = [bool(torch.equal(found[0][0], other[0])) for other in found[1:]]
        kept = [found[0][1] == other[1] for other in found[1:]]
        print(json.dumps({"check": method, "same_tokens": same, "same_kept": kept}), flush=True)


def largest(model: PreTrainedModel, lengths_of: Callable[[int], Tensor], tokens: int) -> dict:
    """Tokens per second at the largest batch that fits into memory."""
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] - 2.5e9
    rows = int(free // (model.config.num_hidden_layers * KV_HEADS * (tokens + 17) * 4 * DIM))
    while rows:
        try:
            run = ready(model, filled(lengths_of(rows), 17), False)
            taken = step_ms(run, STEPS, 3)
            return {"rows": rows, "step_ms": taken, "per_s": round(1000 * rows / taken["median"])}
        except torch.OutOfMemoryError:
            rows -= max(1, rows // 20)
            run = None
            torch.cuda.empty_cache()
    raise RuntimeError("not a single row fits")


def steps(model: PreTrainedModel, compiled: bool) -> dict[str, Any]:
    """Step times at batch 1."""
    layers = model.config.num_hidden_layers
    result: dict[str, Any] = {}
    same, ragged = alike(layers, 1, BUDGET), unlike(layers, 1, BUDGET)
    kinds: dict[str, tuple[Tensor, type[FixedKV]]] = {
        "layer_wise": (same, FixedKV),
        "head_wise": (ragged, FixedKV),
        "full": (alike(layers, 1, SEEN), FixedKV),
        "full_sdpa": (alike(layers, 1, SEEN), SdpaKV),
    }
    for name, (lengths, kind) in kinds.items():
        if compiled and name != "head_wise":
            continue
        run = ready(model, filled(lengths, 64, kind), compiled)
        result[name] = step_ms(run)
        print(json.dumps({name: result[name]}), flush=True)
        if name == "head_wise":
            print(name, "of 4 steps", *kernels(lambda run=run: run(4), 20), sep="\n", flush=True)
        del run
        torch.cuda.empty_cache()
    FAILED.add("gemv")  # from now on cuBLAS
    result["head_wise_cublas"] = step_ms(ready(model, filled(ragged, 64), compiled))
    FAILED.remove("gemv")
    result["head_wise_with_cuts"] = with_cuts(model, ragged, compiled)
    return result


def curves(model: PreTrainedModel) -> dict[str, Any]:
    """Milliseconds of a step over the budget and over the tokens seen; of attention over heads."""
    layers, found = model.config.num_hidden_layers, dict[str, dict[int, float]]()

    def one(held: int, seen: int) -> float:
        torch.cuda.empty_cache()
        run = ready(model, filled(alike(layers, 1, held), 64, seen=seen), False)
        return step_ms(run, STEPS, 3)["median"]

    lengths = [2**n for n in range(10, 18)]
    found["step by budget"] = {n: one(n, SEEN) for n in (256, 512, 1024, 2048, 4096, 8192)}
    found[f"budget {BUDGET} by tokens seen"] = {n: one(min(n, BUDGET), n) for n in lengths}
    found["full cache by tokens seen"] = {n: one(n, n) for n in lengths}
    found["attention by KV heads"] = {n: attention_ms(n, layers) for n in (1, 2, 4, 8, 16, 32, 64)}
    machine = {"what": "machine"} | gpu()
    return {"figures": [machine], "curves": {name: {"ms": ms} for name, ms in found.items()}}


def attention_ms(kv_heads: int, layers: int, group: int = 4) -> float:
    """Of all layers' attention on BUDGET tokens of each KV head, as a CUDA graph."""
    new = {"dtype": torch.bfloat16, "device": "cuda"}
    query, key = torch.randn(kv_heads, group, DIM, **new), torch.randn(kv_heads, DIM, **new)
    size = BUDGET + 1
    keys, values = torch.randn(2, layers, kv_heads * size, DIM, **new)
    starts = torch.arange(kv_heads, device="cuda") * size
    lengths = torch.full_like(starts, BUDGET, dtype=torch.int32)

    def run() -> None:
        for layer in range(layers):
            held = keys[layer], values[layer]
            ragged_decode(query, key, key, *held, starts, lengths, BUDGET, DIM**-0.5)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    return round(min(milliseconds(graph.replay) for _ in range(9)), 4)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--batch", action="store_true")
    parser.add_argument("--curves", type=Path)
    asked = parser.parse_args()
    with torch.inference_mode():
        if asked.curves:
            asked.curves.write_text(json.dumps(curves(llama()), indent=1))
            return
        if asked.check:
            check(asked.compiled)
        model = llama()
        speed, size = bandwidth(), weight_bytes(model)
        what = {
            "benchmark": "decode",
            "context": SEEN,
            "budget": BUDGET,
            "compiled": asked.compiled,
        }
        what |= {"copy_tb_s": round(speed, 3), "weights_gb": round(size / 1e9, 3)}
        bound = size / speed / 1e9
        found = steps(model, asked.compiled)
        ratios = {f"{name}_over_bound": round(x["median"] / bound, 3) for name, x in found.items()}
        print(json.dumps(what | {"bound_ms": round(bound, 3)} | found | ratios | gpu()), flush=True)
        if asked.batch:
            layers = model.config.num_hidden_layers
            small = largest(model, lambda rows: unlike(layers, rows, BUDGET), BUDGET)
            torch.cuda.empty_cache()
            large = largest(model, lambda rows: alike(layers, rows, SEEN), SEEN)
            ratio = round(small["per_s"] / large["per_s"], 1)
            print(json.dumps({"tappa": small, "full": large, "ratio": ratio} | gpu()), flush=True)


if __name__ == "__main__":
    main()
