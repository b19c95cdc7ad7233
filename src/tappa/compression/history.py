"""The token ids that a cache has seen, so that another text is not taken for their continuation.

`generate` cuts off what a cache has seen by its length alone. Before it does so, the model's
`prepare_inputs_for_generation` gets the whole text: there it is compared, once for each text.
"""

import inspect
import threading
import weakref
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from tappa.cache_argument import cache_among
from tappa.errors import CompressionError

UNKNOWN = -1  # the id of padding, and of tokens that came as embeddings
PIECES = 256  # put together when there are more
_lock = threading.RLock()  # one at a time puts a function into a model, or takes it out


class History:
    """Token ids of every row by position."""

    def __init__(self) -> None:
        self._pieces: list[Tensor] = []  # (rows, tokens) each

    @property
    def length(self) -> int:
        """Positions that are known of."""
        return sum(piece.shape[1] for piece in self._pieces)

    def note(self, ids: Tensor, start: int, valid: Tensor | None = None) -> None:
        """Ids (rows, new), or embeddings, from position `start` on; nothing waits for a GPU."""
        if self._pieces and len(self._pieces[0]) != len(ids):
            self._pieces = []
        self.cut(start)
        shape = len(ids), start - self.length
        if shape[1]:
            self._pieces.append(torch.full(shape, UNKNOWN, device=ids.device))
        if ids.dim() > 2:
            piece = torch.full(ids.shape[:2], UNKNOWN, device=ids.device)
        else:
            piece = ids.detach().long().clone()
        if valid is not None:
            piece = piece.masked_fill(~valid.to(piece.device), UNKNOWN)
        self._pieces.append(piece)
        if len(self._pieces) > PIECES:
            self._pieces = [self._whole()]

    def cut(self, length: int) -> None:
        """Forget all from a position on."""
        if self.length > length:
            self._pieces = [self._whole()[:, :length]] if length else []

    def select(self, rows: Tensor) -> None:
        """Take these rows, by index or by a mask."""
        if self._pieces:
            whole = self._whole()
            self._pieces = [whole[rows.to(whole.device)]]

    def repeat(self, times: int) -> None:
        """Every row so many times."""
        if self._pieces:
            self._pieces = [self._whole().repeat_interleave(times, 0)]

    def copy(self) -> "History":
        """An independent copy: pieces are never written in place."""
        twin = History()
        twin._pieces = list(self._pieces)
        return twin

    def difference(self, text: Tensor) -> tuple[int, int] | None:
        """Row and position of the first token of a text (rows, tokens) that is another one."""
        known = self._whole() if self._pieces else None
        if known is None or len(known) != len(text) or known.shape[1] > text.shape[1]:
            return None
        given = text[:, : known.shape[1]].to(known.device)
        places = ((given != known) & (known != UNKNOWN)).nonzero()
        row, at = places[places[:, 1].argmin()].tolist() if len(places) else (0, UNKNOWN)
        return None if at == UNKNOWN else (row, at)

    def check(self, text: Tensor) -> None:
        """Raise CompressionError for a text (rows, tokens) that begins with other tokens."""
        found = self.difference(text)
        if found is None:
            return
        known, (row, at) = self._whole(), found
        where = f"position {at}" + (f" of row {row}" if len(known) > 1 else "")
        raise CompressionError(
            f"expected a text that begins with the {known.shape[1]} tokens that the cache has "
            f"seen, got id {int(text[row, at])} in the place of {int(known[row, at])} at "
            f"{where}: call reset() before another text"
        )

    def _whole(self) -> Tensor:
        if len(self._pieces) > 1:
            device = self._pieces[0].device
            self._pieces = [torch.cat([piece.to(device) for piece in self._pieces], 1)]
        return self._pieces[0]


@runtime_checkable
class Remembers(Protocol):
    """A cache that knows what it has seen."""

    history: History


def watch_prompts(cache: Any) -> None:
    """Have whole texts that the cache's model prepares for it compared, while the cache lives."""
    model = cache.model
    if not hasattr(model, "prepare_inputs_for_generation"):
        return
    with _lock:
        known = vars(model).get(_Prepare.name)
        prepare = known if isinstance(known, _Prepare) else _Prepare(model, known)
        prepare.users += 1
        setattr(model, _Prepare.name, prepare)
    weakref.finalize(cache, _leave, weakref.ref(model))


def _leave(model: "weakref.ref[nn.Module]") -> None:
    found = model()
    with _lock:
        prepare = None if found is None else vars(found).get(_Prepare.name)
        if not isinstance(prepare, _Prepare):
            return
        prepare.users -= 1
        if prepare.users == 0:
            delattr(found, _Prepare.name)
            if prepare.before is not None:
                setattr(found, _Prepare.name, prepare.before)


class _Prepare:
    """In the place of a model's `prepare_inputs_for_generation`, as long as it has a cache."""

    name = "prepare_inputs_for_generation"

    def __init__(self, model: nn.Module, before: Any) -> None:
        self.model, self.before, self.users = weakref.ref(model), before, 0
        self.__signature__ = inspect.signature(before or _own(model))

    def __call__(self, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        """What the model prepares, unless the text is another than the cache has seen."""
        model: Any = self.model()
        cache, begins = cache_among(kwargs), kwargs.get("is_first_iteration")
        if begins and isinstance(cache, Remembers) and _is_whole(input_ids, cache, kwargs):
            cache.history.check(input_ids)
        return (self.before or _own(model))(input_ids, *args, **kwargs)

    def __reduce__(self) -> Any:
        """In a copy of the model, which has no cache yet: its plain function."""
        return _own, (self.model(),)


def _is_whole(ids: Tensor, cache: Remembers, kwargs: dict[str, Any]) -> bool:
    """Whether these are all tokens of a text, and not the new ones alone.

    From 5.24 on transformers leaves out a mask of ones, and says how many tokens are new.
    """
    mask, new = kwargs.get("attention_mask"), kwargs.get("next_sequence_length")
    if mask is not None:
        return mask.shape == ids.shape
    return new == ids.shape[1] - cache.history.length


def _own(model: Any) -> Any:
    return type(model).prepare_inputs_for_generation.__get__(model)
