"""Write on with a compressed cache, and tell what it took: memory, time, tokens held."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer, TextStreamer

from tappa.arguments import whole_number
from tappa.cache_argument import with_cache
from tappa.compression.cache import CompressedCache
from tappa.compression.decoding import generate, takes_over
from tappa.compression.greedy import greedy_arguments, warn_of_left_out
from tappa.compression.reading import read_in_pieces
from tappa.errors import CompressionError, NonFiniteError, TextError
from tappa.models import context_length
from tappa.texts import in_chat_template, require_unicode
from tappa.wording import byte_size, counted


@dataclass(frozen=True)
class Written:
    """A continuation and what it took. Bytes are those of keys and values."""

    text: str
    prompt_tokens: int
    new_tokens: int
    tokens_seen: int
    tokens_held: float  # mean over layers and KV heads
    nbytes: int  # held at the end
    peak_nbytes: int
    beside_nbytes: int  # of what is remembered beside keys and values
    full_nbytes: int  # what all tokens seen would take in these layers
    prefill_seconds: float  # until the first new token is known
    decode_seconds: float  # all further ones

    def __repr__(self) -> str:
        start = self.text if len(self.text) <= 40 else f"{self.text[:40]}..."
        tokens = f"{counted(self.new_tokens, 'token')} after {self.prompt_tokens:,}"
        held = f"{self.tokens_held:,.1f} of {self.tokens_seen:,} held, {byte_size(self.nbytes)}"
        return f"<Written {start!r}: {tokens}; {held}>"


def write_on(
    cache: CompressedCache,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int = 200,
    *,
    chat: bool = False,
    show: Callable[[str], None] | None = None,
    graph: bool | None = None,
    compiled: bool = False,
    chunk: int | None = None,
) -> Written:
    """Continue a prompt greedily on a new `cache` of `tappa.compressed`.

    With `chat` the prompt is a user's message, put into the tokenizer's chat template. `show` is
    called with each piece of text as it is written. `graph` and `compiled` are those of
    `tappa.compression.generate`, which writes on a GPU; elsewhere, and where a model's generation
    config asks for another than the most probable token, `model.generate` does. The text is greedy
    whatever that config says: a warning names what is left out (beams, several texts for a prompt).

    With `chunk` the prompt is read in pieces of that many tokens.

        written = write_on(tappa.compressed(model, "tappa", 512), tokenizer, prompt)

    Raises TextError for a prompt that is empty, or too long for the model together with what is to
    be written, CompressionError where `graph` or `compiled` is asked for and cannot be.
    """
    model = cache.model
    if chunk is not None:
        whole_number("chunk", chunk, 1, CompressionError)
    ids = _encode(tokenizer, prompt, chat)
    check_length(model, ids.shape[1], max_new_tokens)
    warn_of_left_out(model)
    clock = _Clock(tokenizer, show or (lambda text: None))
    ids, steps = ids.to(model.device), takes_over(model, graph)
    if compiled and not steps:
        raise CompressionError(
            "compiled steps need a GPU, and a model whose generation config asks for no more than "
            "the most probable token"
        )
    start = time.perf_counter()
    if chunk is not None and chunk < ids.shape[1]:
        pieces = (ids.shape[1] - 1) // chunk  # the last one is read with what follows
        read_in_pieces(cache, ids[:, : pieces * chunk], chunk)
    if steps:
        output = generate(
            *(cache, ids, max_new_tokens), graph=graph, compiled=compiled, show=clock.put_row
        )
        clock.end()
    else:
        pad = tokenizer.pad_token_id or tokenizer.eos_token_id
        output = _by_transformers(cache, tokenizer, ids, max_new_tokens, clock, pad)
    end = time.perf_counter()
    new, shards = output[0, ids.shape[1] :], cache.shards
    return Written(
        text=str(tokenizer.decode(new, skip_special_tokens=True)),
        prompt_tokens=ids.shape[1],
        new_tokens=len(new),
        tokens_seen=cache.tokens_seen,
        tokens_held=shards.total(cache.tokens_held()) / shards.ranks,
        nbytes=int(shards.total(cache.nbytes)),
        peak_nbytes=int(shards.total(cache.peak_nbytes)),
        beside_nbytes=int(shards.total(cache.beside_nbytes)),
        full_nbytes=int(shards.total(cache.full_nbytes)),
        prefill_seconds=clock.first - start,
        decode_seconds=end - clock.first,
    )


def _by_transformers(
    cache: CompressedCache,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    new: int,
    clock: "_Clock",
    pad: int | None,
) -> Tensor:
    model: Any = cache.model
    arguments: dict[str, Any] = greedy_arguments(model, tokenizer) | with_cache(model, cache)
    return model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        use_cache=True,
        max_new_tokens=new,
        streamer=clock,
        logits_processor=LogitsProcessorList([_RefuseNaN()]),
        pad_token_id=pad,
        **{name: value for name, value in arguments.items() if name != "do_sample"},
    )


class _RefuseNaN(LogitsProcessor):
    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Called by transformers with the logits of every step."""
        if bool(scores.isnan().any()):
            raise NonFiniteError("NaN among the logits of a new token: look at the weights")
        return scores


class _Clock(BaseStreamer):
    """Notes when the first new token is known, and passes on the text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Callable[[str], None]) -> None:
        self.text = TextStreamer(tokenizer, skip_special_tokens=True)
        self.text.on_finalized_text = lambda text, stream_end=False: show(text)  # type: ignore[method-assign]
        self.prompt, self.first = False, 0.0

    def put(self, value: Tensor) -> None:
        """Called by transformers: the prompt at first, then one token at a time."""
        if self.prompt:
            self.put_row(value[None])
        self.prompt = True

    def put_row(self, value: Int[Tensor, "1 new"]) -> None:
        """New tokens."""
        tokens = value.cpu()
        self.first = self.first or time.perf_counter()
        self.text.put(tokens)

    def end(self) -> None:
        """Nothing more comes."""
        self.text.end()


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool) -> Tensor:
    return torch.tensor([prompt_ids(tokenizer, prompt, chat)])


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool = False) -> list[int]:
    """The tokens of a prompt as `write_on` reads it. Raises TextError."""
    require_unicode(prompt, "the prompt")
    if chat:
        prompt = in_chat_template(tokenizer, prompt)
    encoded: Any = tokenizer(prompt, add_special_tokens=not chat, verbose=False)
    if not encoded.input_ids:
        raise TextError("expected a prompt of at least 1 token, got none")
    return list(encoded.input_ids)


def check_length(model: Any, tokens: int, new: int) -> None:
    """Whether a model, or one of this config, takes so many tokens. Raises TextError."""
    context = context_length(model)
    if new < 1:
        raise TextError(f"expected at least 1 new token, got {new}")
    if context is not None and tokens + new > context:
        raise TextError(
            f"a prompt of {tokens} tokens and {new} new ones are more than the model's context of "
            f"{context} tokens"
        )
