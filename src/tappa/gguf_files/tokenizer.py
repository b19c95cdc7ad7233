"""The tokenizer in a GGUF file: byte-level BPE ("gpt2") or SentencePiece BPE ("llama")."""

import warnings
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TokenizersBackend

from tappa.gguf_files.header import Header

_CONTROL, _USER_DEFINED = 3, 4
_SPACE = "\u2581"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_PUNCTUATION = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SMALL, _CAPITAL = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_CAPITAL}*{_SMALL}+%s|[^\r\n\p{{L}}\p{{N}}]?{_CAPITAL}+{_SMALL}*%s"
)
_SLASHES = _PUNCTUATION.replace(r"[\r\n]*|", r"[\r\n/]*|", 1)
# how a byte-level text is cut before merging (`tokenizer.ggml.pre`), as llama.cpp does it
_LLAMA3 = rf"{_ENDINGS}|{_LETTERS}|\p{{N}}{{1,3}}{_PUNCTUATION}"
_QWEN2 = rf"{_ENDINGS}|{_LETTERS}|\p{{N}}{_PUNCTUATION}"
_TEKKEN = rf"{_CASED % ('', '')}|\p{{N}}{_SLASHES}"
_GPT4O = rf"{_CASED % (_ENDINGS + '?', _ENDINGS + '?')}|\p{{N}}{{1,3}}{_SLASHES}"
_SPLITS = {
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "dbrx", "smaug-bpe"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"), _QWEN2),
    **dict.fromkeys(("gpt-4o", "llama4", "minimax-m2"), _GPT4O),
    "tekken": _TEKKEN,
}
_GPT2 = ("default", "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling")
_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
_NAMES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def read_tokenizer(header: Header, folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that a file describes, the same on every version of transformers.

    Kinds other than "gpt2" and "llama" are left to transformers. Warns where text is cut by rules
    that are not known here.
    """
    build = {"gpt2": _byte_level, "llama": _sentencepiece}.get(_key(header, "model"))
    if build is None:
        return AutoTokenizer.from_pretrained(folder, gguf_file=str(header.path))
    tokens = _tokens(header)
    backend = build(header, tokens)
    _add_tokens(backend, header, tokens)
    _add_ends(backend, header, tokens)
    special: dict[str, Any] = {
        f"{name}_token": tokens[number]
        for name, key in _NAMES.items()
        if (number := _key(header, f"{key}_token_id")) is not None
    }
    tokenizer = TokenizersBackend(tokenizer_object=backend, **special)
    if template := header.values.get("tokenizer.chat_template"):
        tokenizer.chat_template = template
    return tokenizer


def _byte_level(header: Header, tokens: list[str]) -> Tokenizer:
    merges = [tuple(merge.split(" ")) for merge in _key(header, "merges", [])]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    pre = _key(header, "pre", "default")
    whole_words = _SPLITS.get(pre) is _LLAMA3
    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=whole_words))
    backend.pre_tokenizer = _cutting(pre)
    backend.decoder = decoders.ByteLevel()
    if _SPLITS.get(pre) is _QWEN2:
        backend.normalizer = normalizers.NFC()
    return backend


def _cutting(pre: str) -> pre_tokenizers.PreTokenizer:
    if pre in _SPLITS:
        split = pre_tokenizers.Split(Regex(_SPLITS[pre]), behavior="isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([split, level])
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre in _DIGITS:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level])
    if pre not in _GPT2:
        text = (
            f"its tokenizer cuts text as {pre!r} does, which is not known here: GPT-2's rules are"
        )
        warnings.warn(f"{text} taken, so that some words get other tokens", stacklevel=6)
    return level


def _sentencepiece(header: Header, tokens: list[str]) -> Tokenizer:
    """Merges in the order of the scores; Gemma's scores do not tell it, but its positions do."""
    vocabulary = {token: number for number, token in enumerate(tokens)}
    is_gemma = header.architecture.startswith("gemma")
    scores = [-float(i) for i in range(len(tokens))] if is_gemma else _key(header, "scores", [])
    unknown = _key(header, "unknown_token_id")
    backend = Tokenizer(
        models.BPE(
            vocabulary,
            _merges(vocabulary, scores),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = [normalizers.Prepend(_SPACE)] if _key(header, "add_space_prefix", True) else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    backend.decoder = decoders.Sequence(steps)
    return backend


def _merges(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to make a token of two, those of the best tokens first."""
    found = []
    for token, number in vocabulary.items():
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        halves = [(a, b) for a, b in cuts if a in vocabulary and b in vocabulary]
        halves.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        found += [(scores[number], pair) for pair in halves]
    found.sort(key=lambda one: (one[0], len(one[1][0]), len(one[1][1])), reverse=True)
    return [pair for _, pair in found]


def _tokens(header: Header) -> list[str]:
    """The vocabulary; Gemma's files write its tokens of several spaces with plain ones."""
    tokens: list[str] = _key(header, "tokens")
    if _key(header, "model") != "llama":
        return tokens
    return [_SPACE * len(t) if " " in t and not t.strip() else t for t in tokens]


def _add_tokens(backend: Tokenizer, header: Header, tokens: list[str]) -> None:
    """Control tokens are special, those of users are matched whole."""
    kinds = _key(header, "token_type", [])
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [
            AddedToken(token, normalized=False, special=special)
            for token, its_kind in zip(tokens, kinds, strict=False)
            if its_kind == kind
        ]
        if special:
            backend.add_special_tokens(added)
        else:
            backend.add_tokens(added)


def _add_ends(backend: Tokenizer, header: Header, tokens: list[str]) -> None:
    """Let texts begin with BOS and end with EOS, where the file says so."""
    is_llama = _key(header, "model") == "llama"
    ends = {
        "bos": _key(header, "add_bos_token", is_llama),
        "eos": _key(header, "add_eos_token", False),
    }
    numbers = {name: _key(header, f"{name}_token_id") for name, wanted in ends.items() if wanted}
    used = {name: (tokens[n], n) for name, n in numbers.items() if n is not None}
    if used:
        first, last = ([used[name][0]] if name in used else [] for name in ("bos", "eos"))
        backend.post_processor = processors.TemplateProcessing(
            single=[*first, "$A", *last],
            pair=[*first, "$A", *last, *first, "$B", *last],
            special_tokens=list(used.values()),
        )


def _key(header: Header, name: str, default: Any = None) -> Any:
    return header.values.get(f"tokenizer.ggml.{name}", default)
