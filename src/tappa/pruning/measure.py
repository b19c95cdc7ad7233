"""Size, speed and perplexity of a model, before and after."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from tappa.cache_argument import cache_among, with_cache
from tappa.pruning.windows import Windows

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Figures:
    """What a table before and after shows."""

    parameters: int
    nbytes: int
    speeds: list[float]  # tokens per second, written one by one; of each run
    perplexity: float
    nll: list[float] = field(repr=False)  # of each window, mean over its tokens
    where: str  # device and threads

    @property
    def tokens_per_second(self) -> float:
        """Median of the runs."""
        return statistics.median(self.speeds)


def nll_of_windows(
    model: PreTrainedModel, windows: Windows, progress: Progress | None = None
) -> list[float]:
    """Mean -log p of the tokens of each window after its first, in nats."""
    device, found = next(model.parameters()).device, []
    with torch.inference_mode():
        for number, ids in enumerate(windows.ids):
            if progress is not None:
                progress(number, len(windows.ids))
            tokens = torch.tensor([ids], device=device)
            logits = model(tokens, use_cache=False).logits[0, :-1]
            found.append(float(cross_entropy(logits.float(), tokens[0, 1:])))
    return found


def perplexity_of(nll: list[float]) -> float:
    """exp of the mean over windows; infinity where that is too large for a number."""
    try:
        return math.exp(sum(nll) / len(nll))
    except OverflowError:
        return math.inf


def measure(
    model: PreTrainedModel, windows: Windows, *, runs: int = 5, progress: Progress | None = None
) -> Figures:
    """Parameters, bytes, decoding speed and perplexity on windows of held-out text."""
    parameters = {id(p): p for p in model.parameters()}.values()  # tied ones count once
    nll = nll_of_windows(model, windows, progress)
    return Figures(
        parameters=sum(p.numel() for p in parameters),
        nbytes=sum(p.numel() * p.element_size() for p in parameters),
        speeds=[_speed(model, windows.ids[0][:128]) for _ in range(runs + 1)][1:],  # one warms up
        perplexity=perplexity_of(nll),
        nll=nll,
        where=_where(model),
    )


def _where(model: PreTrainedModel) -> str:
    device = next(model.parameters()).device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def _speed(model: PreTrainedModel, prompt: list[int], steps: int = 32) -> float:
    """Tokens per second of greedy decoding after a short prompt, batch 1."""
    device = next(model.parameters()).device
    with torch.inference_mode():
        ids = torch.tensor([prompt], device=device)
        out = model(ids, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
        start = time.perf_counter()
        for _ in range(steps):
            out = model(token, use_cache=True, **with_cache(model, cache_among(out)))
            token = out.logits[:, -1:].argmax(-1)
        token.tolist()  # waits for a GPU
    return steps / (time.perf_counter() - start)
