"""Windows of text, for calibration and for perplexity."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tappa.arguments import require_tokenizer, whole_number
from tappa.errors import PruningError, TextError
from tappa.files import digest_of
from tappa.models import context_length
from tappa.texts import MIN_TOKENS, as_texts, require_unicode
from tappa.wording import counted


@dataclass(frozen=True)
class Windows:
    """Token ids of each window, and how they were cut."""

    ids: list[list[int]]
    window: int
    stride: int

    def __repr__(self) -> str:
        return (
            f"<{counted(len(self.ids), 'window')} of at most {counted(self.window, 'token')}, "
            f"one every {self.stride:,}>"
        )

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: str | Path | Sequence[str | Path],
        *,
        window: int = 1024,
        stride: int = 256,
        limit: int | None = None,
    ) -> "Windows":
        """Windows of texts; a text shorter than one is one window. See `calibrate`.

        Raises TextError for too short a text, PruningError for windows that cannot be.
        """
        require_tokenizer(tokenizer)
        window = whole_number("window", window, 1, PruningError)
        stride = whole_number("stride", stride, 1, PruningError)
        limit = None if limit is None else whole_number("limit", limit, 1, PruningError)
        context = context_length(model) or window
        if not MIN_TOKENS <= window <= context:
            raise PruningError(
                f"expected windows of {MIN_TOKENS} to {context} tokens, got {window}"
            )
        found: list[list[int]] = []
        for text in as_texts(texts):
            require_unicode(text, "a text")
            ids = list(tokenizer(text, verbose=False).input_ids)
            last = max(len(ids) - window, 0)
            found += [ids[start : start + window] for start in range(0, last + 1, stride)]
        if not found or min(map(len, found)) < MIN_TOKENS:
            shortest = min(map(len, found), default=0)
            raise TextError(f"expected texts of at least {MIN_TOKENS} tokens, got {shortest}")
        if limit is not None and limit < len(found):
            found = [found[i * len(found) // limit] for i in range(limit)]
        return cls(found, window, stride)

    @property
    def settings(self) -> dict[str, int]:
        """How they were cut."""
        return {"window": self.window, "stride": self.stride}

    @property
    def digest(self) -> str:
        """A fingerprint of all ids."""
        return digest_of(self.ids)
