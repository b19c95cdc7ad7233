"""Eight long-context tasks made from texts and code that every Python installation has.

A suite is a folder of lm-eval task files: for each task NAME.yaml and NAME.jsonl, the latter in the
format of LongBench (https://arxiv.org/abs/2308.14508), scored by lm-eval's own LongBench metrics.
`lm-eval --include_path FOLDER --tasks NAME` runs it.
"""

import ast
import functools
import itertools
import json
import random
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tappa.errors import EvaluationError
from tappa.files import ensure_folder, write_atomic
from tappa.texts import packaged_text

# What is made up, so that no text and no model knows it: the answer is in the context or nowhere.
_TOWNS = """Elbury Tarnwick Osmere Quillham Vexford Brindlow Halcombe Norrowby Pellgrave Drifford
    Lunsby Gorsemoor Yarrowick Skelmere Umberley Fennock"""
_FIRST_NAMES = """Edwin Martha Oscar Selma Hugo Greta Felix Nadia Ruben Petra Anton Clara Viktor
    Irene Jonas Wanda"""
_SURNAMES = """Tarrow Holmquist Veldman Pruitt Ashgrove Lindqvist Morcant Bexley Dunmore Ostrava
    Kettler Rainford Sandoval Whitlock Zeller Arkwright"""
_COLOURS = "amber cobalt crimson emerald ivory lilac maroon olive scarlet silver teal turquoise"
_GOODS = """bells clocks lanterns kites violins teapots carpets mirrors saddles baskets ladders
    compasses hammocks barrels"""
TOWNS, FIRST_NAMES, SURNAMES = _TOWNS.split(), _FIRST_NAMES.split(), _SURNAMES.split()
COLOURS, GOODS = _COLOURS.split(), _GOODS.split()
METRICS = "lm_eval.tasks.longbench.metrics"
LABELS = ("apple", "river", "lemon", "tiger", "piano")
TRAINS = ("express train", "night ferry", "mail coach", "slow train", "harbour bus")

_SENTENCE_END = re.compile(
    r"(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)(?<!\bSt\.)(?<!e\.g\.)(?<!i\.e\.)"
    r'(?:(?<=[.!?])|(?<=[.!?]"))\s+(?=["A-Z])'
)
_LONGEST = 500  # characters of a paragraph; longer ones are cut between sentences


def sentences(text: str) -> list[str]:
    """The sentences of a paragraph, joined by a space they are the paragraph again."""
    return _SENTENCE_END.split(text)


def paragraphs(text: str) -> list[str]:
    """The paragraphs of prose in a text, each on one line of 60 to about 500 characters.

    Headings, lists, tables and code are left out: what is indented or has few letters.
    """
    found = []
    for block in re.split(r"\n\s*\n", text):
        if block[:1].isspace() or block[:1] in "*+-#|=.":
            continue
        piece = ""
        for sentence in sentences(" ".join(block.split())):
            if piece and len(piece) + len(sentence) > _LONGEST:
                found.append(piece)
                piece = sentence
            else:
                piece = f"{piece} {sentence}".strip()
        found.append(piece)
    return [piece for piece in found if _is_prose(piece)]


def _is_prose(piece: str) -> bool:
    letters = sum(character.isalpha() or character == " " for character in piece)
    ends = piece.endswith((".", "!", "?", '"', "'", "”", "’"))
    return 60 <= len(piece) <= 2 * _LONGEST and ends and letters > 0.9 * len(piece)


def manual_paragraphs() -> list[str]:
    """The prose of Python's language reference, from `pydoc_data.topics`."""
    from pydoc_data.topics import topics

    return list(
        dict.fromkeys(itertools.chain(*(paragraphs(topics[key]) for key in sorted(topics))))
    )


@dataclass(frozen=True)
class Library:
    """The real texts that samples are cut from: the paragraphs of each source, and source files."""

    prose: list[list[str]]  # the novel, the manual, then the caller's texts
    code: list[str]

    @classmethod
    def open(cls, texts: Sequence[str] = ()) -> "Library":
        """Raises EvaluationError for a text without prose, or without Python's sources."""
        prose = [paragraphs(packaged_text()), manual_paragraphs()]
        for number, text in enumerate(texts, start=1):
            prose.append(paragraphs(text))
            if not prose[-1]:
                raise EvaluationError(
                    f"expected paragraphs of 60 characters or more, text {number} has none"
                )
        return cls(prose, _standard_library())

    def paragraphs(self, rng: random.Random) -> Iterator[str]:
        """Endless prose: successive paragraphs of one source from a random one on, then another."""
        while True:
            source = rng.choice(self.prose)
            yield from source[rng.randrange(len(source)) :]

    def new_sentences(self, rng: random.Random) -> Iterator[str]:
        """The sentences of `paragraphs` of up to 30 words, in order, none of them twice."""
        seen = set()
        for sentence in itertools.chain.from_iterable(map(sentences, self.paragraphs(rng))):
            if sentence not in seen and len(sentence.split()) <= 30:
                seen.add(sentence)
                yield sentence

    def sentences(self, rng: random.Random, source: int | None = None) -> Iterator[str]:
        """Endless sentences of 5 to 30 words, each from a random paragraph."""
        while True:
            texts = rng.choice(self.prose) if source is None else self.prose[source]
            sentence = rng.choice(sentences(rng.choice(texts)))
            if 5 <= len(sentence.split()) <= 30:
                yield sentence


def _standard_library() -> list[str]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    names = [p for p in sorted(folder.glob("*.py")) if not p.name.startswith("_sysconfigdata")]
    sources = []
    for path in names:
        try:
            sources.append(path.read_bytes().decode("utf-8").replace("\r\n", "\n"))
        except (OSError, UnicodeDecodeError):
            continue
    if not any(map(_next_lines, sources)):
        raise EvaluationError(f"expected the sources of Python's standard library in {folder}")
    return sources


@functools.cache
def _next_lines(source: str) -> tuple[int, ...]:
    """Numbers, from 0, of the lines that are one statement of a function, of names seen before.

    Every word of the line is in the 30 lines before it, and the line itself is not.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except SyntaxError:
        return ()
    lines = source.split("\n")
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    statements = (node for function in functions for node in ast.walk(function))
    kinds = (ast.Assign, ast.AugAssign, ast.Return, ast.Expr, ast.Raise)
    found = set()
    for node in statements:
        if not isinstance(node, kinds) or node.lineno != node.end_lineno:
            continue
        number = node.lineno - 1
        line, before = lines[number], lines[max(0, number - 30) : number]
        words = set(re.findall(r"\w+", line))
        if (
            12 <= len(line.strip()) <= 70
            and len(words) >= 3
            and not re.search(r"[`#\t]|//|\"\"\"|^\s*['\"]|^\s*[^ (]+:", line)
            and line not in before
            and words <= set(re.findall(r"\w+", "\n".join(before)))
        ):
            found.add(number)
    return tuple(sorted(found))


@dataclass(frozen=True)
class Sample:
    """One document of a task: what LongBench calls context, input and answers."""

    context: str
    question: str
    answers: list[str]
    classes: list[str] | None = None


@dataclass(frozen=True)
class Draft:
    """A sample of no size yet: `build` makes it of some first pieces of `filler`."""

    filler: Iterator[str]
    build: Callable[[list[str]], Sample]
    least: int = 1  # pieces of filler


@dataclass(frozen=True)
class Task:
    """How the samples of a task are drawn, asked and scored.

    `prompt` is lm-eval's doc_to_text; `metric` a metric of lm_eval.tasks.longbench.metrics.
    """

    draft: Callable[[random.Random, Library, int], Draft]
    prompt: str
    metric: str
    answer_tokens: int
    until: list[str] = field(default_factory=lambda: ["\n", "."])
    language: str = "en"

    def render(self, sample: Sample) -> str:
        """The prompt that lm-eval makes of the sample."""
        before, after = self.prompt.split("{{context}}")
        return before + sample.context + after.replace("{{input}}", sample.question)


def _hidden(pieces: list[str], needles: Sequence[tuple[float, str]]) -> list[str]:
    """The pieces with each needle at its depth, 0 to 1, at the end of a piece."""
    hidden = list(pieces)
    for depth, needle in needles:
        place = min(int(depth * len(pieces)), len(pieces) - 1)
        hidden[place] = f"{hidden[place]} {needle}"
    return hidden


def _depths(rng: random.Random, count: int) -> list[float]:
    """Depths in random order, one in each of `count` equal parts of the context."""
    depths = [(part + rng.random()) / count for part in range(count)]
    rng.shuffle(depths)
    return depths


def _people(rng: random.Random, count: int) -> list[str]:
    first, last = rng.sample(FIRST_NAMES, count), rng.sample(SURNAMES, count)
    return [f"{a} {b}" for a, b in zip(first, last, strict=True)]


def _things(rng: random.Random, count: int) -> list[str]:
    colours, goods = rng.sample(COLOURS, count), rng.sample(GOODS, count)
    return [f"{a} {b}" for a, b in zip(colours, goods, strict=True)]


def _single_doc(rng: random.Random, library: Library, limit: int) -> Draft:
    """One of four facts in a text, of towns that differ."""
    kinds: list[tuple[str, Callable[[random.Random, int], list[str]]]] = [
        ("The lighthouse of {} is kept by", _people),
        ("The museum of {} is known for its", _things),
        ("The mayor of {} is called", _people),
        ("The market of {} is the only one that sells", _things),
    ]
    stem, values = rng.choice(kinds)
    towns, answers = rng.sample(TOWNS, 4), values(rng, 4)
    facts = [f"{stem.format(town)} {answer}." for town, answer in zip(towns, answers, strict=True)]
    needles = list(zip(_depths(rng, 4), facts, strict=True))

    def build(pieces: list[str]) -> Sample:
        context = "\n\n".join(_hidden(pieces, needles))
        return Sample(context, stem.format(towns[0]), [answers[0]])

    return Draft(library.paragraphs(rng), build)


def _multi_doc(rng: random.Random, library: Library, limit: int) -> Draft:
    """Who lives where in one passage, what the place is known for in another: three such pairs."""
    people, towns, things = _people(rng, 4), rng.sample(TOWNS, 4), _things(rng, 4)
    lives = [f"{a} lives in {b}." for a, b in zip(people, towns, strict=True)]
    known = [f"The people of {a} make {b}." for a, b in zip(towns, things, strict=True)]
    needles = list(zip(_depths(rng, 6), [*lives[1:], *known[1:]], strict=True))
    example = f"{people[0]} lives in {towns[0]} where they make {things[0]}."

    def build(pieces: list[str]) -> Sample:
        texts = _hidden(pieces, needles)
        cuts = [len(texts) * part // 6 for part in range(7)]
        parts = [" ".join(texts[a:b]) for a, b in itertools.pairwise(cuts)]
        first = f"Passage 1:\n{lives[0]} {known[0]}"
        rest = (f"Passage {number}:\n{part}" for number, part in enumerate(parts, start=2))
        question = f"{example}\n{people[1]} lives in"
        answer = f"{towns[1]} where they make {things[1]}"
        return Sample("\n\n".join([first, *rest]), question, [answer])

    return Draft(library.new_sentences(rng), build, least=6)


def _passage_retrieval(rng: random.Random, library: Library, limit: int) -> Draft:
    """Which of 8 numbered passages a sentence is from."""
    target = rng.randrange(8)
    choice = rng.random()

    def build(pieces: list[str]) -> Sample:
        cuts = [len(pieces) * part // 8 for part in range(9)]
        parts = [" ".join(pieces[a:b]) for a, b in itertools.pairwise(cuts)]
        found = [s for s in sentences(parts[target]) if len(s) > 40] or [parts[target]]
        excerpt = found[int(choice * len(found))]
        numbered = (f"Paragraph {number}: {part}" for number, part in enumerate(parts, start=1))
        return Sample("\n\n".join(numbered), excerpt, [f"Paragraph {target + 1}"])

    return Draft(library.new_sentences(rng), build, least=8)


def _passage_count(rng: random.Random, library: Library, limit: int) -> Draft:
    """How many different passages there are, 2 to 7, where one to three come twice."""
    count = rng.randint(2, 7)
    twice = [rng.randrange(count) for _ in range(rng.randint(1, 3))]

    def build(pieces: list[str]) -> Sample:
        cuts = [len(pieces) * part // count for part in range(count + 1)]
        parts = [" ".join(pieces[a:b]) for a, b in itertools.pairwise(cuts)]
        numbered = [f"Passage {number}: {part}" for number, part in enumerate(parts, start=1)]
        context = "\n\n".join([*numbered, *(numbered[which] for which in twice)])
        return Sample(context, "", [str(count)])

    return Draft(library.new_sentences(rng), build, least=count)


def _few_shot(rng: random.Random, library: Library, limit: int) -> Draft:
    """Novel, manual, code or timetable? By labels whose meaning only the examples show."""
    labels = rng.sample(LABELS, 4)
    novel, manual = library.sentences(rng, 0), library.sentences(rng, 1)
    makers: list[Callable[[], str]] = [
        lambda: next(novel),
        lambda: next(manual),
        lambda: _code_line(rng, library),
        lambda: _departure(rng),
    ]

    def examples() -> Iterator[str]:
        while True:
            for kind in rng.sample(range(4), 4):
                yield f"Text: {makers[kind]()}\nLabel: {labels[kind]}"

    asked = rng.randrange(4)
    question = f"Text: {makers[asked]()}\nLabel:"

    def build(pieces: list[str]) -> Sample:
        return Sample("\n".join(pieces), question, [labels[asked]], sorted(labels))

    return Draft(examples(), build, least=4)


def _code_line(rng: random.Random, library: Library) -> str:
    while True:
        source = rng.choice(library.code)
        if numbers := _next_lines(source):
            return source.split("\n")[rng.choice(numbers)].strip()


def _departure(rng: random.Random) -> str:
    time = f"{rng.randint(5, 23)}:{rng.randrange(0, 60, 5):02d}"
    train, town, gate = rng.choice(TRAINS), rng.choice(TOWNS), rng.randint(1, 9)
    return f"The {time} {train} to {town} leaves from gate {gate}."


def _code_completion(rng: random.Random, library: Library, limit: int) -> Draft:
    """The next line of a function of the standard library, whose words all came shortly before."""
    wanted = 4.0 * limit  # characters before the line: less only where no file is so long
    late: list[int] = []
    while not late:
        source = rng.choice(library.code)
        lines = source.split("\n")
        starts = list(itertools.accumulate((len(line) + 1 for line in lines), initial=0))
        if starts[-1] > wanted:
            late = [number for number in _next_lines(source) if starts[number] > wanted]
        wanted *= 0.99
    number = rng.choice(late)

    def build(pieces: list[str]) -> Sample:
        return Sample("".join(f"{line}\n" for line in reversed(pieces)), "", [lines[number]])

    return Draft(reversed(lines[:number]), build, least=30)


def _dialogue_recall(rng: random.Random, library: Library, limit: int) -> Draft:
    """What one of five speakers chose, in a long talk of other things."""
    speakers, things = rng.sample(FIRST_NAMES, 5), _things(rng, 5)
    depths = _depths(rng, 5)
    order = rng.random()

    def build(pieces: list[str]) -> Sample:
        talk = random.Random(order)
        turns = [f"{talk.choice(speakers)}: {piece}" for piece in pieces]
        for depth, speaker, thing in sorted(
            zip(depths, speakers, things, strict=True), reverse=True
        ):
            turns.insert(int(depth * len(pieces)), f"{speaker}: I will take the {thing}.")
        return Sample("\n".join(turns), f"{speakers[0]} will take the", [things[0]])

    return Draft(library.sentences(rng), build, least=5)


def _number_recall(rng: random.Random, library: Library, limit: int) -> Draft:
    """One of eight numbers that are hidden in prose, each with its name."""
    names = _things(rng, 8)
    numbers = [str(number) for number in rng.sample(range(10000, 100000), 8)]
    facts = [f"The number of the {a} is {b}." for a, b in zip(names, numbers, strict=True)]
    needles = list(zip(_depths(rng, 8), facts, strict=True))

    def build(pieces: list[str]) -> Sample:
        context = "\n\n".join(_hidden(pieces, needles))
        return Sample(context, f"The number of the {names[0]} is", [numbers[0]])

    return Draft(library.paragraphs(rng), build)


TASKS: Mapping[str, Task] = {
    "local_single_doc": Task(
        _single_doc,
        "Read the text and remember the facts in it.\n\n{{context}}\n\n"
        "A fact from the text above:\n{{input}}",
        "qa_f1",
        16,
    ),
    "local_multi_doc": Task(
        _multi_doc,
        "Read the passages and join what they say.\n\n{{context}}\n\n"
        "From the passages above we know:\n{{input}}",
        "qa_f1",
        24,
    ),
    "local_passage_retrieval": Task(
        _passage_retrieval,
        "Here are eight paragraphs.\n\n{{context}}\n\n"
        'The sentence "{{input}}" is from one of the paragraphs above. It is from Paragraph',
        "retrieval",
        8,
    ),
    "local_passage_count": Task(
        _passage_count,
        "Here are numbered passages. Some of them come twice, with the same number.\n\n{{context}}"
        "\n\nQuestion: How many different passages are there above? Passages with the same number "
        "are the same.\nAnswer: There are{{input}}",
        "count",
        8,
    ),
    "local_few_shot": Task(
        _few_shot,
        "Label each text as the examples do.\n\n{{context}}\n{{input}}",
        "classification",
        8,
        ["\n"],
    ),
    "local_code_completion": Task(
        _code_completion,
        "Please complete the code given below.\n{{context}}{{input}}",
        "code_sim",
        32,
        ["\n"],
        "python",
    ),
    "local_dialogue_recall": Task(
        _dialogue_recall,
        "Here is a talk among friends.\n\n{{context}}\n\nWhat we know from the talk:\n{{input}}",
        "qa_f1",
        16,
    ),
    "local_number_recall": Task(
        _number_recall,
        "Read the text and remember the numbers in it.\n\n{{context}}\n\n"
        "A number from the text above:\n{{input}}",
        "count",
        12,
    ),
}


def write_local_suite(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    per_task: int = 50,
    lengths: Sequence[int] = (1024, 2048, 4096, 8192),
    seed: int = 0,
    texts: Sequence[str] = (),
) -> list[str]:
    """Write the eight tasks into `folder` and return their names.

    Sample i of a task has length lengths[i % len(lengths)]: so many tokens of `tokenizer` hold its
    prompt and answer; the column `length` is the number of tokens of the prompt. It depends on
    seed, task, i, the length, `texts`, the tokenizer and the version of Python alone: more samples
    change no earlier ones. The prose is the packaged novel, Python's manual and `texts`; the code
    is the standard library. The YAML holds the absolute path of its JSONL, as `datasets` would look
    for another in the working directory.

    Raises EvaluationError for per_task < 1, no lengths, a length too small for a sample, a text
    without prose; OutputError where nothing can be written.
    """
    check_count(per_task)
    if not lengths:
        raise EvaluationError("expected at least one length, got none")
    folder = ensure_folder(folder)
    library = Library.open(texts)
    size = functools.cache(lambda text: len(tokenizer(text, verbose=False).input_ids))
    for name, task in TASKS.items():
        rows = []
        for number in range(per_task):
            length = lengths[number % len(lengths)]
            rng = random.Random(f"{seed}/{name}/{number}")
            limit = length - task.answer_tokens
            draft = task.draft(rng, library, max(limit, 1))
            fitted = _fit(task, draft, limit, size)
            if fitted is None:
                raise EvaluationError(f"{length} tokens are too few for a sample of {name}")
            rows.append(_row(name, task, number, *fitted))
        write_task(folder, name, rows, _settings(task))
    return list(TASKS)


def check_count(per_task: int) -> None:
    """Raises EvaluationError unless there is to be a sample."""
    if per_task < 1:
        raise EvaluationError(f"expected per_task of at least 1, got {per_task}")


def _fit(
    task: Task, draft: Draft, limit: int, size: Callable[[str], int]
) -> tuple[Sample, int] | None:
    """The sample with as much filler as `limit` tokens hold, and its tokens."""
    pieces: list[str] = []
    filled = 0
    for piece in draft.filler:
        filled += size(piece)
        pieces.append(piece)
        if filled > limit and len(pieces) > draft.least:
            break
    while len(pieces) >= draft.least:
        sample = draft.build(pieces)
        tokens = size(task.render(sample))
        if tokens <= limit:
            return sample, tokens
        fitting = filled * limit // tokens  # a piece can be in the prompt more than once
        while pieces and (filled > fitting or filled <= 0):
            filled -= size(pieces.pop())
    return None


def _row(name: str, task: Task, number: int, sample: Sample, tokens: int) -> dict[str, Any]:
    return {
        "input": sample.question,
        "context": sample.context,
        "answers": sample.answers,
        "length": tokens,
        "dataset": name,
        "language": task.language,
        "all_classes": sample.classes,
        "_id": f"{name}-{number}",
    }


def _settings(task: Task) -> dict[str, Any]:
    return {
        "output_type": "generate_until",
        "doc_to_text": task.prompt,
        "doc_to_target": "{{answers[0]}}",
        "process_results": f"!function {METRICS}.get_{task.metric}_with_score",
        "generation_kwargs": {
            "max_gen_toks": task.answer_tokens,
            "do_sample": False,
            "until": task.until,
        },
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in ("score", f"{task.metric}_score")
        ],
    }


def write_task(
    folder: Path, name: str, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> None:
    """Write NAME.jsonl and the NAME.yaml that reads it, with further `settings` of the task.

    Each setting is one line of JSON, which is YAML too; a text "!function ..." becomes that tag.
    """
    data = folder.absolute() / f"{name}.jsonl"
    write_atomic(data, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    entries = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        **settings,
        "metadata": {"version": 1.0},
    }
    lines = [f"{key}: {_yaml(value)}\n" for key, value in entries.items()]
    write_atomic(folder / f"{name}.yaml", "".join(lines))


def _yaml(value: Any) -> str:
    if isinstance(value, str) and value.startswith("!function "):
        return value
    return json.dumps(value)
