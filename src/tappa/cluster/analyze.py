"""`tappa analyze` on many workers: each does shards of the texts, merged in order."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from tappa.analysis import Analysis, analyze, analyze_prompts, describe, forward_passes, shards_of
from tappa.checkpoint import fingerprint, first_line
from tappa.cluster.pieces import Pieces
from tappa.cluster.pool import Failed, InProcess, ModelSource, Placement, Pool, Worker, call
from tappa.cluster.progress import Follow, ignore
from tappa.errors import AnalysisFileError, ClusterError
from tappa.files import digest_of, write_atomic
from tappa.layer_statistics import LayerStatistics, Settings
from tappa.models import context_length
from tappa.report.looking import look
from tappa.report.views import Views
from tappa.tensor_parallel import rank_of_torchrun
from tappa.texts import encode_texts


@dataclass(frozen=True)
class _Shard:
    """One piece of work."""

    source: ModelSource
    prompts: Sequence[np.ndarray]  # ids, int32: a ninth of a list's memory
    settings: Settings
    chunk: int | None


def analyze_texts(
    pool: Pool,
    texts: Sequence[str],
    *,
    tokens: int | None = None,
    settings: Settings | None = None,
    chunk: int | None = None,
    folder: Path | None = None,
    follow: Follow = ignore,
) -> Analysis:
    """`tappa.analyze` by a pool: the same sums to the last bit, where kernels give the same.

    With `folder`, shards that are done are kept below `folder/pieces`, and a run that was ended
    goes on there. Raises ClusterError for shards that failed, and what `tappa.analyze` raises.
    """
    wanted = settings or Settings()
    if isinstance(pool, InProcess) and folder is None:
        return analyze(
            *(*pool.worker.model(pool.source), texts),
            tokens=tokens,
            settings=wanted,
            chunk=chunk,
            progress=lambda done, total: follow(done, total, 0, 0),
        )
    prompts, identity = call(pool, _prepare, (pool.source, list(texts), tokens))
    forward_passes(prompts, chunk)
    shards = shards_of(prompts)
    pieces = Pieces(
        *(len(shards), Analysis.merge, write_sums, read_sums),
        folder=None if folder is None else folder / "pieces",
    )
    pieces.open(identity | {"settings": asdict(wanted), "chunk": chunk, "shards": len(shards)})
    jobs = {f"shard {n}": _Shard(pool.source, shards[n], wanted, chunk) for n in pieces.missing}
    do_pieces(pool, _analyze_shard, jobs, pieces, follow)
    return pieces.result()


def state_folder(out: Path | None, placement: Placement) -> Path | None:
    """Where a command keeps its pieces: one in process only goes on with those of workers."""
    if out is None or not placement.in_process:
        return out
    return out if (out / "pieces").is_dir() and rank_of_torchrun() is None else None


def do_pieces(pool: Pool, task: Any, jobs: dict[str, Any], pieces: Pieces, follow: Follow) -> None:
    """Have a pool do the missing pieces, named by their number.

    Raises ClusterError for those that failed, KeyboardInterrupt where some were left by one.
    """
    failed: list[Failed] = []
    follow(pieces.total - len(jobs), pieces.total, 0, 0)
    for done in pool.run(task, jobs):
        if isinstance(done, Failed):
            failed.append(done)
        else:
            pieces.add(int(done.name.split()[-1]), done.result)
        left = len(pieces.missing)
        follow(pieces.total - left, pieces.total, len(failed), len(pool.retried))
    check_failed(failed)
    if pieces.missing:
        raise KeyboardInterrupt


def check_failed(failed: Sequence[Failed]) -> None:
    """Raise ClusterError for work that failed, with the first few reasons."""
    if failed:
        first = "; ".join(map(str, failed[:3])) + ("; ..." if len(failed) > 3 else "")
        raise ClusterError(
            f"{len(failed)} pieces failed: {first}. The others are kept: the same command tries "
            "these again"
        )


def look_at(pool: Pool, text: str, title: str, tokens: int | None) -> Views:
    """`look` by a worker of a pool."""
    found: Views = call(pool, _look, (pool.source, text, title, tokens))
    return found


def _prepare(
    worker: Worker, payload: tuple[ModelSource, list[str], int | None]
) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Prompts, and what decides the sums."""
    source, texts, tokens = payload
    model, tokenizer = worker.model(source)
    prompts = encode_texts(tokenizer, texts, tokens, context_length(model))
    identity = {
        "model": describe(model),
        "weights": fingerprint(model),
        "prompts": digest_of(*map(digest_of, prompts)),
    }
    return [np.array(ids, np.int32) for ids in prompts], identity


def _analyze_shard(worker: Worker, shard: _Shard) -> Analysis:
    model, _ = worker.model(shard.source)
    prompts = [ids.tolist() for ids in shard.prompts]
    return analyze_prompts(model, prompts, shard.settings, shard.chunk)


def _look(worker: Worker, payload: tuple[ModelSource, str, str, int | None]) -> Views:
    source, text, title, tokens = payload
    return look(*worker.model(source), text, title=title, tokens=tokens)


def write_sums(analysis: Analysis, path: Path) -> Path:
    """The sums of an Analysis as safetensors, atomically; no figures, which follow from them."""
    arrays = {
        f"{number}.{name}": np.asarray(value, order="C")
        for number, layer in enumerate(analysis.layers)
        for name, value in layer.sums.items()
    }
    layers = [
        {"layer": x.layer, "theta": x.theta, "scale": x.scale, "sums": list(x.sums)}
        for x in analysis.layers
    ]
    notes = {
        "model": analysis.model,
        "prompts": analysis.prompts,
        "layers": layers,
        "settings": asdict(analysis.settings),
    }
    return write_atomic(path, save(arrays, {"analysis": json.dumps(notes)}))


def read_sums(path: Path) -> Analysis:
    """What `write_sums` wrote. Raises AnalysisFileError."""
    try:
        with safe_open(path, "numpy") as file:
            notes = json.loads(file.metadata()["analysis"])
            layers = [
                LayerStatistics(
                    *(layer["layer"], layer["theta"], layer["scale"]),
                    {name: file.get_tensor(f"{number}.{name}") for name in layer["sums"]},
                )
                for number, layer in enumerate(notes["layers"])
            ]
        return Analysis(notes["model"], notes["prompts"], layers, Settings(**notes["settings"]))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError) as error:
        raise AnalysisFileError(f"cannot read the sums {path}: {first_line(error)}") from error
