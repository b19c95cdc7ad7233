"""RULER as a suite of lm-eval: its documents generated once, by lm-eval, and frozen to JSONL.

lm-eval generates RULER when a task is loaded: from the global random state, 500 documents for each
length, with essays and a sentence splitter from the network. Here lm-eval's own generators run
with a seed for each task, local prose and a local splitter; scores are lm-eval's own.
Source: Hsieh et al. 2024, "RULER: What's the Real Context Size of Your Long-Context Language
Models?", https://arxiv.org/abs/2404.06654, in the version of lm-eval 0.4.13.
"""

import difflib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import lru_cache
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from transformers import PreTrainedTokenizerBase

from tappa.errors import EvaluationError
from tappa.evaluation.prose import Prose
from tappa.files import ensure_folder, write_atomic

PREFIX = "ruler_"
STEP = 32  # tokens by which a round leaves less room than the one before
MIN_LENGTH = 1024  # less holds no essay: lm-eval adds its words in steps of 500

# What lm_eval.tasks.ruler.niah_utils gives to generate_samples
_WORDS_NUMBERS = {"type_needle_k": "words", "type_needle_v": "numbers"}
_WORDS_UUIDS = {"type_needle_k": "words", "type_needle_v": "uuids"}
_UUIDS_UUIDS = {"type_needle_k": "uuids", "type_needle_v": "uuids"}
NIAH: dict[str, dict[str, Any]] = {
    "niah_single_1": {"type_haystack": "repeat", **_WORDS_NUMBERS},
    "niah_single_2": {"type_haystack": "essay", **_WORDS_NUMBERS},
    "niah_single_3": {"type_haystack": "essay", **_WORDS_UUIDS},
    "niah_multikey_1": {"type_haystack": "essay", **_WORDS_NUMBERS, "num_needle_k": 4},
    "niah_multikey_2": {"type_haystack": "needle", **_WORDS_NUMBERS},
    "niah_multikey_3": {"type_haystack": "needle", **_UUIDS_UUIDS},
    "niah_multivalue": {"type_haystack": "essay", **_WORDS_NUMBERS, "num_needle_v": 4},
    "niah_multiquery": {"type_haystack": "essay", **_WORDS_NUMBERS, "num_needle_q": 4},
}

# lm-eval lets every needle task generate 128 tokens. A number is 7 digits, a UUID 36 characters.
MAX_GEN_TOKS = {
    **{name: 16 for name, kind in NIAH.items() if kind["type_needle_v"] == "numbers"},
    **{name: 48 for name, kind in NIAH.items() if kind["type_needle_v"] == "uuids"},
    "niah_multivalue": 64,
    "niah_multiquery": 64,
    "vt": 30,
    "cwe": 120,
    "fwe": 50,
}
TASKS = (*NIAH, "vt", "cwe", "fwe")

Document = dict[str, Any]


def write_ruler(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tasks: Sequence[str] | None = None,
    lengths: Sequence[int] = (4096,),
    per_task: int = 100,
    seed: int = 0,
    essays: Path | None = None,
) -> list[str]:
    """Write RULER tasks to `folder`, a YAML and a JSONL file each, and return their names.

    One task, such as `ruler_niah_single_2_4096`, for each of `tasks` (all 11 by default) and each
    length: `per_task` documents whose prompt, with the answer's prefix and all tokens to be
    generated, is at most that many tokens of `tokenizer`. The files depend on the seed, the
    tokenizer, the prose and lm-eval alone, not on which other tasks are written; the states of
    `random` and numpy are as before. The prose of the "essay" tasks is that of all `*.txt` in
    `essays`, or the packaged novel followed by Python's help topics; lm-eval adds it in steps of
    500 words and UUIDs in steps of 25 needles, so prompts are up to 700, or 2300, tokens shorter.

    Raises EvaluationError for an unknown task, a length that is too small, or too little text in
    `essays`, and OutputError.
    """
    names = list(dict.fromkeys(_task_named(name) for name in (TASKS if tasks is None else tasks)))
    for length in lengths:
        if length < MIN_LENGTH:
            raise EvaluationError(
                f"expected prompts of at least {MIN_LENGTH} tokens for RULER, got {length}"
            )
    if per_task < 1:
        raise EvaluationError(f"expected at least 1 sample for each task, got {per_task}")
    prose = Prose(essays, max(lengths, default=0))
    folder = ensure_folder(folder).absolute()
    written = []
    for name in names:
        for length in lengths:
            documents = _fitting(name, length, per_task, tokenizer, seed, prose)
            written.append(_write_task(folder, name, length, documents))
    return written


def process_results(doc: Document, results: list[str]) -> dict[str, float]:
    """The share of the expected answers that occur in the response, whatever their case.

    lm-eval's own RULER score, whose metric carries the length as its name there.
    """
    from lm_eval.tasks.ruler.common_utils import postprocess_pred, string_match_all

    return {"score": string_match_all(postprocess_pred(results), [doc["outputs"]])}


def _task_named(name: str) -> str:
    short = name.removeprefix(PREFIX)
    if short not in TASKS:
        near = difflib.get_close_matches(short, TASKS, n=3, cutoff=0.0)
        raise EvaluationError(
            f"expected a RULER task, got {name!r}; the nearest are {', '.join(near)}"
        )
    return short


def _fitting(
    name: str,
    length: int,
    count: int,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    prose: Prose,
) -> list[Document]:
    """Documents that need at most `length` tokens, the generated ones and the prefix included.

    lm-eval's generators do not count all of these (fwe no generated token, vt not the new names in
    its example): those that are too long are generated again for fewer tokens. Document i is that
    of the first of these rounds in which it fits, so more documents change no earlier ones.
    """
    encode = lru_cache(maxsize=4)(lambda text: tokenizer(text, verbose=False))
    found: list[Document | None] = [None] * count
    room = length
    while None in found and room > MIN_LENGTH // 2:
        wanted = max(number for number, document in enumerate(found) if document is None) + 1
        with _seeded(f"{seed} {name} {length}"), _silent():
            documents = _generate(name, room, wanted, encode, prose)
        if len(documents) < wanted or not all(document["outputs"] for document in documents):
            break
        for number, document in enumerate(documents):
            prompt = document["input"] + _delimiter(name) + document["gen_prefix"]
            document["length"] = len(encode(prompt).input_ids) + MAX_GEN_TOKS[name]
            document["max_length"] = length
            if found[number] is None and document["length"] <= length:
                found[number] = document
        room -= max(documents[0]["length"] - length, STEP)
    if None in found:
        raise EvaluationError(f"{length} tokens are too few for {PREFIX}{name} with this tokenizer")
    return [document for document in found if document is not None]


def _generate(
    name: str, length: int, count: int, encode: Callable[[str], Any], prose: Prose
) -> list[Document]:
    """What lm-eval generates for a task, `count` documents where it takes 500."""
    if name in NIAH:
        return _generate_niah(name, length, count, encode, prose)
    if name == "vt":
        return _generate_vt(length, count, encode)
    if name == "cwe":
        from lm_eval.tasks.ruler import cwe_utils

        # its own generator goes on from task to task
        with patch.object(cwe_utils, "RNG", random.Random(random.getrandbits(64))):
            return cwe_utils.sys_word_pair_random(count, length, encode)
    from lm_eval.tasks.ruler import fwe_utils

    return fwe_utils.sys_kwext(encode, length, count)


def _generate_niah(
    name: str, length: int, count: int, encode: Callable[[str], Any], prose: Prose
) -> list[Document]:
    import nltk

    with patch.object(nltk, "download", lambda *_: None):  # importing it asks for punkt_tab
        from lm_eval.tasks.ruler import niah_utils, prepare_niah

    kind = NIAH[name]
    if kind["type_haystack"] == "essay":
        haystack, split = prose.load()
    else:
        haystack, split = prepare_niah.get_haystack(kind["type_haystack"]), None
    with patch.object(prepare_niah, "cached_sent_tokenize", split):
        try:
            documents = prepare_niah.generate_samples(
                haystack,
                encode,
                max_seq_length=length,
                num_samples=count,
                template=niah_utils.TEMPLATE,
                **kind,
            )
        except ValueError:  # no document fits
            return []
    if split is not None and len(documents[0]["input"].split()) > len(haystack):
        few = f"the essays have only {len(haystack)} words"
        raise EvaluationError(f"expected text for {length} tokens, {few}")
    return documents


def _generate_vt(length: int, count: int, encode: Callable[[str], Any]) -> list[Document]:
    from lm_eval.tasks.ruler import vt_utils

    def fits(noises: int, room: int, *, example: bool) -> bool:
        text, _ = vt_utils.generate_input_output(noises, 1, 4, is_icl=example)
        # 64: the tokens to be generated, and random names of more tokens
        return len(encode(text).input_ids) + 64 <= room

    # lm-eval would try for ever where its least noise does not fit
    if not fits(5, 500, example=True):
        return []
    example = vt_utils.sys_vartrack_w_noise_random(encode, 1, 500, incremental=5)[0]
    used = len(encode(" ".join([example["input"], *example["outputs"]])).input_ids)
    if not fits(10, length - used, example=False):
        return []
    return vt_utils.sys_vartrack_w_noise_random(encode, count, length, icl_example=example)


@contextmanager
def _seeded(seed: str) -> Iterator[None]:
    """The global random states set by `seed`, and put back afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(random.getrandbits(32))
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def _silent() -> Iterator[None]:
    """Without the progress bars and prints of the generators."""
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        yield


def _delimiter(name: str) -> str:
    """What lm-eval puts between a prompt and the answer's prefix."""
    return "\n\n" if name == "cwe" else " "


def _write_task(folder: Path, name: str, length: int, documents: list[Document]) -> str:
    task = f"{PREFIX}{name}_{length}"
    lines = [json.dumps(document, ensure_ascii=False) + "\n" for document in documents]
    data = write_atomic(folder / f"{task}.jsonl", "".join(lines))
    yaml = f"""\
task: {task}
tag: tappa_ruler
dataset_path: json
dataset_kwargs: {{data_files: {{test: {json.dumps(str(data), ensure_ascii=False)}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{input}}}}"
doc_to_target: "{{{{outputs}}}}"
gen_prefix: "{{{{gen_prefix}}}}"
target_delimiter: {json.dumps(_delimiter(name))}
process_results: !function {process_results.__module__}.process_results
metric_list: [{{metric: score, aggregation: mean, higher_is_better: true}}]
generation_kwargs:
  do_sample: false
  temperature: 0.0
  max_gen_toks: {MAX_GEN_TOKS[name]}
  until: []
metadata: {{version: 1.0}}
"""
    write_atomic(folder / f"{task}.yaml", yaml)
    return task
