"""When memory does not suffice: fewer samples are answered together, and the run goes on."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from tappa.errors import EvaluationError
from tappa.tensor_parallel import rank_of_torchrun

Item = TypeVar("Item")
Cell = TypeVar("Cell")

# what the libraries say that raise plain RuntimeErrors when an allocation fails
_WORDS = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # its workspace could not be had
    "CUDNN_STATUS_ALLOC_FAILED",
    "can't allocate memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no room, by kind or by the words of a library."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


def free_memory() -> None:
    """Let go of what nobody holds any more, on the GPU too: after the `except`, not inside."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def chunks(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """Successive parts of at most `size`."""
    return [items[start : start + size] for start in range(0, len(items), size)]


@dataclass
class Room:
    """How much of each task fits into memory at once, as far as a run knows: less each time.

    A batch is halved down to one sample, then its cells down to one; `say` gets a line each time.
    """

    say: Callable[[str], None] = lambda text: None
    most: dict[str, tuple[int, int]] = field(default_factory=dict)  # samples, cells

    def parts(
        self, task: str, samples: Sequence[Item], cells: Sequence[Cell]
    ) -> list[tuple[Sequence[Item], Sequence[Cell]]]:
        """The batch in parts that are not known to be too large."""
        size, width = self.most.get(task, (len(samples), len(cells)))
        return [
            (some, of_cells) for some in chunks(samples, size) for of_cells in chunks(cells, width)
        ]

    def shrink(self, task: str, samples: int, cells: int, error: BaseException) -> None:
        """So many samples in so many cells were too much.

        Raises EvaluationError where there is nothing to halve. Processes of torchrun do not halve:
        they must all do the same.
        """
        if rank_of_torchrun() is not None or samples == cells == 1:
            reason = (str(error) or type(error).__name__).splitlines()[0][:200]
            tip = "a smaller batch" if samples > 1 else "shorter prompts or a smaller model"
            raise EvaluationError(
                f"out of memory in {task} with {samples} samples in {cells} cells: {reason}; "
                f"choose {tip}"
            ) from error
        less = (samples // 2, cells) if samples > 1 else (1, cells // 2)
        self.most[task] = less
        what, before, now = (
            ("samples", samples, less[0]) if samples > 1 else ("cells", cells, less[1])
        )
        self.say(f"out of memory in {task} with {before} {what} together: going on with {now}")
