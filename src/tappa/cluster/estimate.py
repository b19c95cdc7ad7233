"""`--dry-run`: what a job consists of and what it costs, before any model is loaded."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
from safetensors import safe_open

from tappa.analysis import SHARDS
from tappa.cluster.pool import Placement
from tappa.models import local_path
from tappa.pruning import Windows
from tappa.pruning.calibration import EVERY
from tappa.texts import DEFAULT_TOKENS

if TYPE_CHECKING:
    from tappa.evaluation.evaluate import Evaluation


def estimate_analysis(
    model: str | None, texts: Sequence[str], tokens: int | None, placement: Placement
) -> str:
    """Prompts, shards and the work of reading them."""
    most = [min(tokens or DEFAULT_TOKENS, _most_tokens(text)) for text in texts]
    shards = min(len(texts), SHARDS)
    lines = [
        f"{len(texts)} prompts of at most {max(most):,} tokens, in {shards} shards",
        _on_workers(shards, "shards", placement),
        _reading(sum(most), model),
    ]
    return "\n".join(lines)


def estimate_grid(
    model: str | None, evaluation: "Evaluation", folder: Path, placement: Placement
) -> str:
    """Cells, samples of each task, the work of reading, and the time that finished samples took."""
    from tappa.evaluation.suites import count_samples

    cells, source = evaluation.cells(), evaluation.source
    share = 1 if evaluation.half is None else 0.5
    names = dict.fromkeys(evaluation.tasks)
    counts = {name: math.ceil(share * count_samples(name, source)) for name in names}
    samples, longest = sum(counts.values()), max(source.lengths)
    budgets = ", ".join(map(str, evaluation.budgets))
    return "\n".join(
        [
            f"{len(cells)} cells: {', '.join(dict.fromkeys(c.method for c in cells))} at {budgets}",
            *(f"{name}: at most {count} samples" for name, count in counts.items()),
            f"at most {samples} samples x {len(cells)} cells = {samples * len(cells):,} answers",
            _on_workers(samples, "samples", placement),
            _reading(samples * longest, model),
            _time(folder, samples, placement),
        ]
    )


def estimate_calibration(model: str | None, windows: Windows, placement: Placement) -> str:
    """Windows, pieces and the work of reading them."""
    tokens, pieces = sum(map(len, windows.ids)), -(-len(windows.ids) // EVERY)
    lines = [
        f"calibration: {len(windows.ids)} windows in {pieces} pieces",
        _on_workers(pieces, "pieces", placement),
        _reading(tokens, model),
    ]
    return "\n".join(lines)


def parameters_of(model: str | None) -> int | None:
    """Parameters of a model on this machine, from the headers of its files; None elsewhere."""
    path = local_path(model)
    if path is None:
        return None
    if path.is_file():
        return sum(int(tensor.n_elements) for tensor in gguf.GGUFReader(path).tensors)
    total = 0
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            names = list(tensors.keys())
            total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in names)
    return total


def _most_tokens(text: str) -> int:
    """A token has a byte at least, and one may stand before the text."""
    return len(text.encode()) + 1


def _on_workers(count: int, what: str, placement: Placement) -> str:
    if placement.in_process:
        return f"in this process, {count} {what} one after the other"
    each = -(-count // placement.workers)
    return f"on {placement.workers} workers: at most {each} {what} each"


def _reading(tokens: int, model: str | None) -> str:
    text = f"to read: at most {tokens:,} tokens"
    parameters = parameters_of(model)
    if not parameters:
        return text
    flop = 2.0 * parameters * tokens
    return f"{text}, about {flop:.1e} FLOP (2 x {parameters:,} parameters x tokens) and attention"


def _time(folder: Path, samples: int, placement: Placement) -> str:
    """What is left takes, if it takes as long as what is there."""
    from tappa.evaluation.store import read_record

    found = [read_record(path) for path in sorted((folder / "samples").glob("*/*.json"))]
    records = [record for record in found if record is not None]
    if not records:
        return f"time: unknown until samples are finished in {folder}"
    seconds = sum(r["prefill_seconds"] + r["cells_seconds"] for r in records)
    each = seconds / len(records)
    left = max(samples - len(records), 0) * each / placement.workers
    return (
        f"time: {each:.2f} s for each of the {len(records)} samples in {folder}; at most "
        f"{left:.0f} s for the others"
    )
