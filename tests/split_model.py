"""What one rank of a tensor-parallel model does: `torchrun split_model.py MODEL OUT`."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import PreTrainedModel

import tappa.cli
from tappa.cache_argument import with_cache
from tappa.compression import generate
from tappa.errors import ModelError
from tappa.pruning import calibrate
from tappa.report.looking import look
from tappa.report.views import save_views

TEXTS = ["It is a truth universally acknowledged, " * 3, "that a single man in possession " * 2]
METHODS = ("snapkv", "tappa", "tappa by heads", "adakv", "cake", "tappa_paper", "h2o")
WRITING = ("snapkv", "adakv", "tappa by heads", "cake")
BUDGET, PROMPT, NEW = 40, 90, 7


def kept(model: PreTrainedModel, method: str, heads: range) -> list[list[list[int]]]:
    """Positions that these KV heads of every layer hold after a prompt and some steps."""
    options: dict[str, Any] = {"per_head": True} if method == "tappa by heads" else {}
    ids = torch.arange(PROMPT)[None] * 7 % 90 + 5
    cache = tappa.compressed(model, method.split()[0], BUDGET, every=2, **options)
    with torch.inference_mode():
        model(ids, **with_cache(model, cache))
        for step in range(NEW):
            model(torch.tensor([[11 + step]]), **with_cache(model, cache))
    layers = range(len(cache.layers))
    return [[cache.positions_held(layer, head) for head in heads] for layer in layers]


def written(model: PreTrainedModel, method: str, graph: bool, heads: range) -> list[Any]:
    """Two rows written from a prompt, and the positions that these KV heads hold then."""
    options: dict[str, Any] = {"per_head": True} if method == "tappa by heads" else {}
    ids = torch.stack([torch.arange(PROMPT) * 7 % 90 + 5, torch.arange(PROMPT) * 11 % 90 + 5])
    cache = tappa.compressed(model, method.split()[0], BUDGET, every=5, **options)
    tokens = generate(cache, ids, 30, graph=graph)[:, PROMPT:].tolist()
    places = [(row, layer) for row in range(2) for layer in range(len(cache.layers))]
    held = [[cache.positions_held(layer, head, row) for head in heads] for row, layer in places]
    return [tokens, held, cache.tokens_seen]


def collectives(model: PreTrainedModel, method: str) -> list[int]:
    """Of every step of some that are written one by one: how often ranks talk for tappa."""
    calls, gather = [0], dist.all_gather

    def noted(*arguments: Any, **options: Any) -> Any:
        calls[-1] += 1
        return gather(*arguments, **options)

    cache = tappa.compressed(model, method, BUDGET, every=5)
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_gather", noted)
        model(torch.arange(PROMPT)[None] + 5, **with_cache(model, cache))
        for step in range(12):
            calls.append(0)
            model(torch.tensor([[11 + step]]), **with_cache(model, cache))
    return calls[1:]


def drawn(model: PreTrainedModel, rank: int) -> list[int]:
    """Tokens drawn by a rank whose random numbers are its own."""
    torch.manual_seed(rank)
    cache = tappa.compressed(model, "snapkv", BUDGET)
    ids = torch.arange(PROMPT)[None] + 5
    return generate(cache, ids, 9, temperature=1.0)[0, PROMPT:].tolist()


def commands(model: Path, out: Path) -> list[list[str]]:
    """An evaluation and an analysis as they are typed; the latter prints JSON alone."""
    (out / "text.txt").write_text(TEXTS[0])
    sizes = ["--limit", "1", "--lengths", "150", "--budgets", "40", "--methods", "full,tappa"]
    what = ["--text", str(out / "text.txt"), "--json", "--shown-texts", "1"]
    return [
        ["eval", str(model), "--tasks", "fidelity", *sizes, "--out", str(out / "results")],
        ["analyze", str(model), *what, "--out", str(out / "analysis")],
    ]


def main(folder: Path, out: Path) -> None:
    model, tokenizer = tappa.load(folder, device="tp")
    rank = dist.get_rank()
    analysis = tappa.analyze(model, tokenizer, TEXTS)
    found = {method: kept(model, method, range(1)) for method in METHODS}
    (out / f"kept-{rank}.json").write_text(json.dumps(found))
    texts = {
        f"{method} {graph}": written(model, method, graph, range(1))
        for method in WRITING
        for graph in (False, True)
    }
    (out / f"written-{rank}.json").write_text(json.dumps(texts))
    talk = {method: collectives(model, method) for method in ("snapkv", "adakv")}
    (out / f"collectives-{rank}.json").write_text(json.dumps(talk))
    (out / f"drawn-{rank}.json").write_text(json.dumps(drawn(model, rank)))
    calibration = calibrate(model, tokenizer, TEXTS, window=31, limit=3)
    views = look(model, tokenizer, TEXTS[0], methods=("snapkv",))
    if rank == 0:
        analysis.save(out / "analysis.json")
        calibration.save(out / "calibration.json")
        save_views(out / "views.npz", [views])
    try:
        tappa.prune(model, calibration, layers=1)
    except ModelError as error:
        (out / f"refused-{rank}").write_text(str(error))
    evaluate, analyze = commands(folder, out)
    tappa.cli.app(evaluate, standalone_mode=False)
    sys.argv = ["tappa", *analyze]
    tappa.cli.main()  # lets go of the other rank


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
