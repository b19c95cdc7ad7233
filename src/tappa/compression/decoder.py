"""One decoding step after the other, on fixed buffers as a CUDA graph where there is a GPU."""

import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from tappa.cache_argument import with_cache
from tappa.compression.fixed import FixedKV, attend, running
from tappa.interface import AttentionSwitch
from tappa.kernels.gemv import FewVectors
from tappa.tensor_parallel import HeadShards

# tokens and their position ids -> logits of the next one
Read = Callable[[Int[Tensor, "rows 1"], Int[Tensor, "rows 1"]], Float[Tensor, "rows vocabulary"]]

ALONE = HeadShards()  # of a model that is not split
_recording = threading.Lock()  # a GPU's random numbers belong to one graph that is recorded


class FixedReader:
    """A model that reads one more token of every row on a FixedKV: the same commands each time."""

    def __init__(
        self, model: PreTrainedModel, fixed: FixedKV, switch: AttentionSwitch, compiled: bool
    ) -> None:
        self.fixed, self.switch = fixed, switch.renewed(attend, masks=False)
        self.cache_argument = with_cache(model, fixed)
        self.forward: Callable[..., Any] = model.forward  # without hooks, which look at the CPU
        if compiled:
            self.forward = torch.compile(model.forward, dynamic=False)

    def __call__(
        self, tokens: Int[Tensor, "rows 1"], position_ids: Int[Tensor, "rows 1"]
    ) -> Float[Tensor, "rows vocabulary"]:
        """Logits of the next token."""
        self.switch.on()
        try:
            with running(self.fixed), FewVectors():
                output = self.forward(
                    input_ids=tokens,
                    position_ids=position_ids,
                    use_cache=True,
                    **self.cache_argument,
                )
        finally:
            self.switch.off()
        self.fixed.advance()
        return output.logits[:, -1]


class Decoder:
    """What was written last, and how the next token is chosen; all of it on the device.

    `temperature` 0 takes the most probable token, else one is drawn. A row that has written one of
    `ends` writes `pad` from then on.
    """

    def __init__(
        self,
        last: Int[Tensor, " rows"],
        position_ids: Int[Tensor, " rows"],
        new: int,
        temperature: float = 0.0,
        ends: Sequence[int] = (),
        pad: int = 0,
        shards: HeadShards = ALONE,
    ) -> None:
        self.temperature, self.pad, self.shards = temperature, pad, shards
        self.tokens, self.position_ids = last[:, None].clone(), position_ids[:, None].clone()
        self.ends = torch.tensor(list(ends), dtype=torch.int64, device=last.device)
        self.finished = torch.isin(last, self.ends)
        self.written = torch.full((len(last), new), pad, dtype=torch.int64, device=last.device)
        self.count = torch.zeros(1, dtype=torch.int64, device=last.device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def step(self, read: Read) -> None:
        """Read the last token, choose the next one."""
        logits = read(self.tokens, self.position_ids)
        chosen = choose_tokens(logits, self.temperature, self.shards)
        chosen = chosen.masked_fill(self.finished, self.pad)
        self.finished |= (chosen[:, None] == self.ends).any(1)
        self.written.index_copy_(1, self.count, chosen[:, None])
        self.tokens.copy_(chosen[:, None])
        self.count += 1
        self.position_ids += 1

    def run(self, read: Read, steps: int) -> None:
        """So many steps."""
        for _ in range(steps):
            if self.graph is None:
                self.step(read)
            else:
                self.graph.replay()

    def capture(self, read: FixedReader) -> None:
        """Record a step as a CUDA graph, which changes nothing yet.

        Where that fails, steps are run one by one, after one warning.
        """
        self.graph = None
        changed = [self.tokens, self.position_ids, self.finished, self.written, self.count]
        changed += read.fixed.state()
        before = [x.clone() for x in changed]
        try:
            with _recording:
                self.graph = self._recorded(read, changed, before)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of the driver, or of the model's own code
            told = (str(error).splitlines() or [""])[0]
            warnings.warn(
                f"this model's step cannot be recorded as a CUDA graph, so that steps are slow: "
                f"{type(error).__name__}: {told}",
                stacklevel=2,
            )
        finally:
            for x, old in zip(changed, before, strict=True):
                x.copy_(old)

    def _recorded(
        self, read: FixedReader, changed: list[Tensor], before: list[Tensor]
    ) -> torch.cuda.CUDAGraph:
        """On a stream of the GPU where the tokens lie, which need not be the current one.

        Other threads may go on meanwhile: that which watches over NCCL asks the GPU all the time.
        """
        device = self.tokens.device
        stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(2):  # kernels are compiled, libraries find their feet
                self.step(read)
                for x, old in zip(changed, before, strict=True):
                    x.copy_(old)
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        recording = torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local")
        with torch.cuda.device(device), recording:
            self.step(read)
        return graph


def choose_tokens(
    logits: Float[Tensor, "rows vocabulary"], temperature: float, shards: HeadShards = ALONE
) -> Int[Tensor, " rows"]:
    """The most probable token of every row, or one drawn from `softmax(logits / temperature)`.

    Ranks of a split model draw each by itself: all take what the first has drawn.
    """
    if temperature == 0:
        return logits.argmax(-1)
    weights = torch.softmax(logits.float() / temperature, -1)
    return shards.of_first((weights / torch.empty_like(weights).exponential_()).argmax(-1))
