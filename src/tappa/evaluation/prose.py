"""The prose that RULER's essay tasks hide their needles in."""

import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from tappa.errors import EvaluationError
from tappa.texts import packaged_text, read_text

Split = Callable[[str], list[str]]


class Prose:
    """The text of the essay tasks, as lm-eval's list of words, and how it splits into sentences."""

    def __init__(self, essays: Path | None, most: int) -> None:
        """`most`: tokens of the longest prompt, which has as many words at most."""
        self._characters = max(1_000_000, 64 * most)
        self._paths = None if essays is None else sorted(Path(essays).glob("*.txt"))
        if self._paths == []:
            raise EvaluationError(f"expected a folder with *.txt files of essays, got {essays}")
        self._loaded: tuple[list[str], Split] | None = None

    def load(self) -> tuple[list[str], Split]:
        """Words and splitter, made at the first call. Raises TextError."""
        if self._loaded is None:
            from nltk.tokenize.punkt import PunktSentenceTokenizer

            text = re.sub(r"\s+", " ", self._text()[: self._characters])
            # lm-eval takes the trained splitter that nltk downloads; this one learns from the prose
            splitter = PunktSentenceTokenizer(text[:300_000])
            self._loaded = text.split(" "), lru_cache(maxsize=16)(splitter.tokenize)
        return self._loaded

    def _text(self) -> str:
        if self._paths is not None:
            texts: list[str] = []
            for path in self._paths:
                if sum(map(len, texts)) < self._characters:
                    texts.append(read_text(path))
            return " ".join(texts)
        from pydoc_data.topics import topics

        return " ".join([packaged_text(), *topics.values()])
