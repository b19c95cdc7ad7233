"""A model without what a plan says: measured before and after, and saved with its card."""

from pathlib import Path

from tappa.checkpoint import LoadedModel
from tappa.pruning.calibration import Calibration
from tappa.pruning.card import as_json, model_card
from tappa.pruning.measure import Figures, Progress, measure
from tappa.pruning.plan import Plan, apply
from tappa.pruning.saving import save_checkpoint
from tappa.pruning.windows import Windows


def remove_and_save(
    loaded: LoadedModel,
    calibration: Calibration,
    wanted: Plan,
    held_out: Windows,
    folder: Path,
    *,
    texts: dict[str, str],
    force: bool = False,
    progress: Progress | None = None,
) -> tuple[Figures, Figures]:
    """Figures on held-out text before and after; the folder gets weights, card and all scores.

    The model in memory is altered. `texts` are as in `model_card`, `force` as in `check_target`.
    Raises OutputError.
    """
    before = measure(loaded.model, held_out, progress=progress)
    apply(loaded.model, wanted)
    figures = before, measure(loaded.model, held_out, progress=progress)
    files: dict[str, str | bytes] = {
        "README.md": model_card(calibration, wanted, figures, texts),
        "pruning.json": as_json(calibration, wanted, figures, texts),
    }
    save_checkpoint(loaded.model, loaded.tokenizer, folder, files=files, force=force)
    return figures
