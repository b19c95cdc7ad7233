"""Five multiple-choice tasks that need no download, for what a model knows without a long context.

Written as lm-eval task files, as `local_suite` does: NAME.yaml and NAME.jsonl with the columns
query, choices, gold (the index of the right choice) and _id; scored by lm-eval's acc and acc_norm.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tappa.evaluation.local_suite import (
    check_count,
    manual_paragraphs,
    paragraphs,
    sentences,
    write_task,
)
from tappa.files import ensure_folder
from tappa.texts import packaged_text

_ANTONYMS = """
    hot/cold big/small fast/slow early/late happy/sad rich/poor light/dark high/low long/short
    wide/narrow old/young strong/weak full/empty wet/dry open/closed clean/dirty loud/quiet near/far
    deep/shallow thick/thin heavy/light sharp/blunt sweet/bitter brave/cowardly true/false good/bad
    first/last inside/outside above/below before/after always/never everything/nothing day/night
    summer/winter love/hate war/peace friend/enemy success/failure begin/end buy/sell give/take
    push/pull win/lose arrive/depart remember/forget increase/decrease accept/refuse build/destroy
    laugh/cry
"""
ANTONYMS = [tuple(pair.split("/")) for pair in _ANTONYMS.split()]
CATEGORIES = {
    "animal": "dog horse rabbit elephant lion sheep wolf monkey",
    "fruit": "apple banana pear cherry strawberry grape lemon mango",
    "vegetable": "carrot potato cabbage onion spinach broccoli lettuce turnip",
    "tool": "hammer saw screwdriver wrench drill chisel pliers axe",
    "musical instrument": "violin piano trumpet flute guitar drum cello harp",
    "vehicle": "car bus truck bicycle motorcycle train van tractor",
    "piece of furniture": "chair table sofa bed desk wardrobe bookcase stool",
    "item of clothing": "shirt jacket skirt sweater coat sock scarf glove",
    "country": "France Japan Brazil Canada Egypt Norway Kenya Portugal",
    "language": "English Latin Hebrew Swahili Mandarin Finnish Arabic Welsh",
    "metal": "iron copper zinc steel aluminium nickel tin lead",
    "colour": "red green blue yellow purple pink brown black",
    "profession": "doctor lawyer teacher carpenter plumber nurse engineer baker",
    "programming language": "Python Java Rust Haskell Perl JavaScript Fortran Kotlin",
}
_SUBJECTS = "key book letter picture door window chair coat teacher sister farmer student"
_ATTRACTORS = "cabinet house king garden road lady school river"
SUBJECTS, ATTRACTORS = _SUBJECTS.split(), _ATTRACTORS.split()
PREPOSITIONS = ["near the", "behind the", "next to the", "of the"]
PREDICATES = [
    ("is", "are", "very old"),
    ("was", "were", "seen yesterday"),
    ("has", "have", "been forgotten"),
    ("seems", "seem", "to be the best"),
    ("looks", "look", "rather strange"),
    ("does", "do", "not belong here"),
]


@dataclass(frozen=True)
class Question:
    """A text and its continuations: the right one and the wrong ones."""

    query: str
    right: str
    wrong: list[str]


Questions = Callable[[int], Question]
"""Question number i of a task."""


def _halves() -> list[list[tuple[str, str]]]:
    """For each source its sentences of 16 to 40 words, cut at their middle."""
    found = []
    for source in (paragraphs(packaged_text()), manual_paragraphs()):
        words = [sentence.split() for paragraph in source for sentence in sentences(paragraph)]
        halves = {
            (" ".join(w[: len(w) // 2]), " ".join(w[len(w) // 2 :])): None
            for w in words
            if 16 <= len(w) <= 40
        }
        found.append(list(halves))
    return found


def _continuation(seed: str) -> Questions:
    """The second half of a real sentence, against second halves of others of the same source."""
    sources = _halves()
    numbers = [(source, n) for source, halves in enumerate(sources) for n in range(len(halves))]
    random.Random(seed).shuffle(numbers)

    def question(number: int) -> Question:
        rng = random.Random(f"{seed}/{number}")
        source, place = numbers[number % len(numbers)]
        query, right = sources[source][place]
        others = [half for _, half in sources[source] if half != right]
        return Question(query, right, rng.sample(others, 3))

    return question


def _agreement(seed: str) -> Questions:
    """The form of the verb that agrees with its subject, past a noun of the other number."""

    def question(number: int) -> Question:
        rng = random.Random(f"{seed}/{number}")
        subject, attractor = rng.choice(SUBJECTS), rng.choice(ATTRACTORS)
        singular, plural, rest = rng.choice(PREDICATES)
        one = rng.random() < 0.5
        noun, verbs = (subject, (singular, plural)) if one else (f"{subject}s", (plural, singular))
        near = _plural(attractor) if one else attractor
        query = f"The {noun} {rng.choice(PREPOSITIONS)} {near}"
        return Question(query, f"{verbs[0]} {rest}.", [f"{verbs[1]} {rest}."])

    return question


def _plural(noun: str) -> str:
    return f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"


def _arithmetic(seed: str) -> Questions:
    """A sum, a difference or a product of small numbers, after three examples."""

    def question(number: int) -> Question:
        rng = random.Random(f"{seed}/{number}")
        *shown, (asked, right) = [_calculation(rng) for _ in range(4)]
        near = [right + step for step in (-10, -2, -1, 1, 2, 10) if right + step >= 0]
        examples = "".join(f"{left} = {value}\n" for left, value in shown)
        wrong = [str(value) for value in rng.sample(near, 3)]
        return Question(f"{examples}{asked} =", str(right), wrong)

    return question


def _calculation(rng: random.Random) -> tuple[str, int]:
    sign = rng.choice("+-*")
    if sign == "*":
        a, b = rng.randint(2, 12), rng.randint(2, 12)
        return f"{a} * {b}", a * b
    a, b = rng.randint(5, 60), rng.randint(2, 40)
    return (f"{a} + {b}", a + b) if sign == "+" else (f"{a + b} - {b}", a)


def _antonym(seed: str) -> Questions:
    """The opposite of a word, against words that have other opposites."""
    asked = [*ANTONYMS, *((b, a) for a, b in ANTONYMS)]
    random.Random(seed).shuffle(asked)

    def question(number: int) -> Question:
        rng = random.Random(f"{seed}/{number}")
        word, right = asked[number % len(asked)]
        others = sorted({w for pair in ANTONYMS if not {word, right} & set(pair) for w in pair})
        return Question(
            f'The opposite of "{word}" is', f'"{right}"', _quoted(rng.sample(others, 3))
        )

    return question


def _quoted(words: list[str]) -> list[str]:
    return [f'"{word}"' for word in words]


def _category(seed: str) -> Questions:
    """What kind of thing a word is, of four kinds."""
    asked = [(word, kind) for kind, words in CATEGORIES.items() for word in words.split()]
    random.Random(seed).shuffle(asked)

    def question(number: int) -> Question:
        rng = random.Random(f"{seed}/{number}")
        word, right = asked[number % len(asked)]
        near = {right, *(("language", "programming language") if "language" in right else ())}
        wrong = rng.sample([kind for kind in CATEGORIES if kind not in near], 3)
        return Question(
            f'The word "{word}" is the name of', _a(right), [_a(kind) for kind in wrong]
        )

    return question


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


TASKS: Mapping[str, Callable[[str], Questions]] = {
    "choice_continuation": _continuation,
    "choice_agreement": _agreement,
    "choice_arithmetic": _arithmetic,
    "choice_antonym": _antonym,
    "choice_category": _category,
}
SETTINGS = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{query}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{gold}}",
    "metric_list": [
        {"metric": metric, "aggregation": "mean", "higher_is_better": True}
        for metric in ("acc", "acc_norm")
    ],
}


def write_choice_suite(folder: Path, *, per_task: int = 200, seed: int = 0) -> list[str]:
    """Write the five tasks into `folder` and return their names.

    Chance is 1/2 for choice_agreement and 1/4 for the others. Sample i depends on seed, task and i
    alone (and for choice_continuation on the version of Python, whose manual is a source): more
    samples change no earlier ones. A list of words that has come to its end starts anew, with other
    wrong choices.

    Raises EvaluationError for per_task < 1, OutputError where nothing can be written.
    """
    check_count(per_task)
    folder = ensure_folder(folder)
    for name, task in TASKS.items():
        questions = task(f"{seed}/{name}")
        rows = [_row(name, seed, number, questions(number)) for number in range(per_task)]
        write_task(folder, name, rows, SETTINGS)
    return list(TASKS)


def _row(name: str, seed: int, number: int, question: Question) -> dict[str, Any]:
    choices = list(question.wrong)
    gold = random.Random(f"{seed}/{name}/{number}/gold").randint(0, len(choices))
    choices.insert(gold, question.right)
    return {"query": question.query, "choices": choices, "gold": gold, "_id": f"{name}-{number}"}
