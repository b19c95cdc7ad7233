"""Texts: reading them, the one shipped with the package, and the tokens a model sees."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tappa.arguments import whole_number
from tappa.errors import TextError
from tappa.wording import described

MIN_TOKENS = 8
DEFAULT_TOKENS = 2048

# Tokens past the wanted ones that must follow before a prefix of a text is trusted: cutting a text
# can change how its last word is tokenized, never that of words this far from the cut.
_MARGIN = 64


def read_text(path: str | Path) -> str:
    """The content of a UTF-8 text file. Raises TextError when it is missing, empty or not UTF-8."""
    path = Path(path)
    if path.is_dir():
        raise TextError(f"expected a text file, got a folder: {path}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"expected UTF-8 text, got byte 0x{error.object[error.start]:02x}"
        raise TextError(f"{message} at offset {error.start} of {path}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise TextError(f"cannot read the text file {path}: {reason}") from error
    if not text.strip():
        raise TextError(f"expected text, got an empty file: {path}")
    return text


def read_lines(path: str | Path) -> Iterator[str]:
    """The lines of a UTF-8 text file, one after the other, without the "\\n" that ends them.

    Other characters that break lines (U+2028) do not end one. No more of the file is read than is
    asked for. Raises TextError for a file that is missing or, where that is read, not UTF-8.
    """
    path, offset = Path(path), 0
    try:
        with path.open("rb") as file:
            for line in file:
                yield line.decode("utf-8-sig" if offset == 0 else "utf-8").removesuffix("\n")
                offset += len(line)
    except UnicodeDecodeError as error:
        message = f"expected UTF-8 text, got byte 0x{error.object[error.start]:02x}"
        raise TextError(f"{message} at offset {offset + error.start} of {path}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise TextError(f"cannot read the text file {path}: {reason}") from error


def packaged_text() -> str:
    """The first volume of Jane Austen's *Pride and Prejudice* (see data/SOURCE.md)."""
    source = resources.files("tappa") / "data" / "pride_and_prejudice.txt"
    return source.read_text(encoding="utf-8")


def packaged_verse() -> str:
    """Thirty of William Shakespeare's *Sonnets* (see data/SOURCE.md)."""
    return (resources.files("tappa") / "data" / "sonnets.txt").read_text(encoding="utf-8")


def packaged_halves() -> tuple[str, str]:
    """The packaged text in two, cut between paragraphs: one to choose on, one to judge on."""
    text = packaged_text()
    middle = text.index("\n\n", len(text) // 2)
    return text[:middle], text[middle:].lstrip("\n")


def packaged_prompt(characters: int = 9000) -> str:
    """The beginning of the packaged text, about 2000 tokens, cut between paragraphs."""
    return packaged_text()[:characters].rpartition("\n\n")[0]


def require_unicode(text: str, what: str) -> None:
    """Raise TextError for half of a surrogate pair, which no tokenizer takes.

    A terminal of another encoding leaves them for its bytes, and JSON may hold them.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        place = f"at offset {error.start} of {what}"
        code = ord(text[error.start])
        if 0xDC80 <= code <= 0xDCFF:
            byte = f"byte 0x{code - 0xDC00:02x} {place}"
            raise TextError(f"expected UTF-8 text, got {byte}: is the terminal's UTF-8?") from error
        raise TextError(f"expected text, got a lone surrogate U+{code:04X} {place}") from error


def as_texts(texts: Any) -> list[str]:
    """One text or several: a str as it is, a Path as the text of its file. Raises TextError."""
    single = isinstance(texts, str | bytes | Path | Mapping) or not isinstance(texts, Iterable)
    found = [texts] if single else list(texts)
    for one in found:
        if not isinstance(one, str | Path):
            ids = ": its text is wanted, not its token ids" if isinstance(texts, Iterable) else ""
            raise TextError(f"expected a text as str or Path, got {described(one)}{ids}")
    return [read_text(one) if isinstance(one, Path) else one for one in found]


def in_chat_template(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A user's message in the tokenizer's chat template, up to where the answer begins.

    Raises TextError without a template, for one that is broken, and for one that rejects the turn.
    """
    if not tokenizer.chat_template:
        raise TextError("expected a tokenizer with a chat template, this one has none")
    with template_errors():
        turn = [{"role": "user", "content": text}]
        return str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))


@contextmanager
def template_errors() -> Iterator[None]:
    """Turn what a chat template raises, of whatever kind, into a TextError of one line."""
    try:
        yield
    except TextError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        text = f"cannot use the chat template of this tokenizer: {reason or type(error).__name__}"
        raise TextError(text) from error


def encode_texts(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    tokens: int | None = None,
    context: int | None = None,
) -> list[list[int]]:
    """The first `tokens` tokens of each text, with the special tokens the tokenizer adds.

    `tokens` is 2048 by default, or the model's `context` where that is smaller; a shorter text is
    used whole. Raises TextError for fewer than 8 tokens, wanted or found, and for more than the
    context.
    """
    limit = _limit(tokens, context)
    if not texts:
        raise TextError("expected at least one text, got none")
    for text in texts:
        require_unicode(text, "a text")
    encoded = [_first_tokens(tokenizer, text, limit) for text in texts]
    for number, ids in enumerate(encoded, start=1):
        if len(ids) < MIN_TOKENS:
            which = f"text {number} of {len(encoded)}" if len(encoded) > 1 else "the text"
            raise TextError(f"expected at least {MIN_TOKENS} tokens, {which} has {len(ids)}")
    return encoded


def _limit(tokens: int | None, context: int | None) -> int:
    if tokens is None:
        return min(DEFAULT_TOKENS, context or DEFAULT_TOKENS)
    tokens = whole_number("tokens", tokens, MIN_TOKENS, TextError)
    if context is not None and tokens > context:
        raise TextError(f"{tokens} tokens are more than the model's context of {context} tokens")
    return tokens


def _first_tokens(tokenizer: PreTrainedTokenizerBase, text: str, limit: int) -> list[int]:
    """The first `limit` tokens of the text, from the shortest prefix that surely holds them."""
    characters = 8 * (limit + _MARGIN)
    while True:
        ids = tokenizer(text[:characters], verbose=False).input_ids
        if characters >= len(text) or len(ids) >= limit + _MARGIN:
            return list(ids[:limit])
        characters *= 2
