"""From names to samples: which suites and tasks there are, and where their data come from."""

import difflib
import functools
import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lm_eval.api.task import Task

from tappa.errors import EvaluationError
from tappa.evaluation.choice_suite import TASKS as CHOICE
from tappa.evaluation.choice_suite import write_choice_suite
from tappa.evaluation.fidelity import NEXT, windows_of_text
from tappa.evaluation.lm_eval_tasks import load_tasks, own_tasks, unknown_task
from tappa.evaluation.local_suite import TASKS as LOCAL
from tappa.evaluation.local_suite import write_local_suite
from tappa.evaluation.longbench import TASKS as LONGBENCH
from tappa.evaluation.longbench import write_longbench
from tappa.evaluation.ruler import TASKS as RULER
from tappa.evaluation.ruler import write_ruler
from tappa.evaluation.samples import Sample, TaskSample, TextSample, samples_of_task
from tappa.evaluation.shared_prefill import GridLM
from tappa.files import digest_of, made_folder, write_atomic
from tappa.texts import packaged_text, read_text

TEXT_TASKS = ("fidelity", "perplexity")
SUITES = (*TEXT_TASKS, "ruler", "longbench", "local", "choice")


@dataclass(frozen=True)
class Source:
    """Where samples come from, and how many."""

    limit: int = 50  # samples of a task
    lengths: tuple[int, ...] = (4096,)  # tokens of prompts, where a task can choose
    seed: int = 0
    data: Path | None = None  # folder of texts (*.txt) and of LongBench (*.jsonl)
    chat: bool = False  # prompts go through the chat template
    include: Path | None = None  # folder of lm-eval task files of one's own


def samples_of(names: Sequence[str], lm: GridLM, source: Source, folder: Path) -> list[Sample]:
    """Samples of suites (`ruler`), their tasks (`ruler_vt_4096`), and any task of lm-eval.

    Task files are written below `folder`. Raises EvaluationError for a name that is neither, for
    missing or malformed data, and where the model's context would cut a prompt.
    """
    for name in names:
        for length in lengths_of(name, source):
            if length > lm.max_length:
                raise EvaluationError(
                    f"{name}: {length} tokens are more than the model's context of "
                    f"{lm.max_length}: choose other lengths"
                )
    found: list[Sample] = []
    for name in dict.fromkeys(names):
        suite = name.split("_")[0]
        if name in own_tasks(source.include):
            found += _samples("lm-eval", load_tasks(name, source.include, SUITES), lm, source)
        elif suite in TEXT_TASKS:
            found += _text_samples(name, lm, source)
        elif suite in SUITES:
            found += _suite_samples(suite, name, lm, source, folder / suite)
        else:
            found += _samples("lm-eval", load_tasks(name, source.include, SUITES), lm, source)
    for sample in found:
        if isinstance(sample, TaskSample):
            sample.check_length(lm)
    lm.forget()
    return found


def lengths_of(name: str, source: Source) -> tuple[int, ...]:
    """Tokens of a task's prompts: those in its name (`ruler_vt_4096`), else the source's.

    Without any where a task does not choose them.
    """
    suite, tail = name.split("_")[0], name.rpartition("_")[2]
    if suite not in (*TEXT_TASKS, "ruler", "local"):
        return ()
    if suite != "local" and tail.isdigit() and (suite in TEXT_TASKS or int(tail) >= 1000):
        return (int(tail),)
    return source.lengths


def count_samples(name: str, source: Source) -> int:
    """How many samples a suite or task has, at most: no task is made for it."""
    tasks = 1
    if name in ("longbench", "local", "choice"):
        tasks = {"longbench": len(LONGBENCH), "local": len(LOCAL), "choice": len(CHOICE)}[name]
    elif name.split("_")[0] in (*TEXT_TASKS, "ruler"):
        lengths = lengths_of(name, source)
        every = name in ("ruler", f"ruler_{lengths[0]}")
        tasks = len(lengths) * (len(RULER) if every else 1)
    return tasks * source.limit


def check_names(names: Sequence[str], data: Path | None, include: Path | None = None) -> None:
    """What can be refused before a model is loaded. Raises EvaluationError."""
    if data is not None and not data.is_dir():
        raise EvaluationError(f"expected a folder of data, got {data}, which is none")
    own = own_tasks(include)
    for name in names:
        close = difflib.get_close_matches(name, [*own, *SUITES], n=1, cutoff=0.8)
        if close and name not in (*own, *SUITES):
            raise EvaluationError(_unknown(name, [*own, *SUITES]))


def texts_of(data: Path | None) -> list[str]:
    """The text files of a folder, or the packaged text without a folder of texts.

    A folder may be there for other tasks (LongBench's *.jsonl). Raises EvaluationError for one that
    has neither, TextError for a text that cannot be read.
    """
    files = sorted(data.glob("*.txt")) if data is not None else []
    if data is not None and not files and not any(data.glob("*.jsonl")):
        raise EvaluationError(f"expected *.txt files (or LongBench's *.jsonl) in {data}, got none")
    return [read_text(file) for file in files] or [packaged_text()]


def _text_samples(name: str, lm: GridLM, source: Source) -> list[Sample]:
    """`fidelity` at all lengths, or `fidelity_2048` at one."""
    task, lengths = name.split("_")[0], lengths_of(name, source)
    if name not in (task, f"{task}_{lengths[0]}"):
        raise EvaluationError(_unknown(name, SUITES))
    text = "\n\n".join(texts_of(source.data))
    encode = functools.partial(_encoded, lm)
    found: list[Sample] = []
    for length in lengths:
        context = length - NEXT if task == "fidelity" else length // 2
        if context < 2:
            least = NEXT + 2 if task == "fidelity" else 4
            raise EvaluationError(f"{length} tokens are too few for {task}, which needs {least}")
        parts = windows_of_text(text, encode, length, source.limit, source.seed)
        for number, window in enumerate(parts):
            sample = TextSample(task, number, window[:context], window[context:])
            sample.task = f"{task}_{length}" if len(lengths) > 1 else name
            found.append(sample)
    return found


def _encoded(lm: GridLM, text: str) -> list[int]:
    return list(lm.tokenizer(text, verbose=False).input_ids)


def _suite_samples(suite: str, name: str, lm: GridLM, source: Source, folder: Path) -> list[Sample]:
    names = _written(suite, name, lm, source, folder)
    return _samples(suite, _tasks_in(folder, names), lm, source)


def _written(suite: str, name: str, lm: GridLM, source: Source, folder: Path) -> list[str]:
    """Write the task files, or find those of an earlier run with the same settings."""
    tokens, libraries = known_tokens(lm), version("lm_eval")
    here = str(folder.absolute())  # task files name it: a folder that was moved has stale ones
    wanted = digest_of(2, name, asdict(source), tokens, lm.max_length, libraries, here)
    notes = folder / f"{name}.made.json"
    if (tasks := _made(notes, wanted)) is not None:
        return tasks
    with made_folder(folder):
        tasks = _WRITERS[suite](name, lm, source, folder)
        if source.data is None:  # other files may come into a folder
            made = {"settings": wanted, "tasks": tasks, "files": _digests(folder, tasks)}
            write_atomic(notes, json.dumps(made))
    return tasks


def _made(notes: Path, wanted: str) -> list[str] | None:
    """The tasks of an earlier run with these settings, if their files are as it wrote them."""
    try:
        made = json.loads(notes.read_bytes())
        tasks = [str(task) for task in made["tasks"]]
        same = made["settings"] == wanted and made["files"] == _digests(notes.parent, tasks)
    except (OSError, ValueError, LookupError, TypeError):  # none, or damaged
        return None
    return tasks if same else None


def _digests(folder: Path, tasks: list[str]) -> dict[str, str]:
    """Of the files of tasks."""
    files = [folder / f"{task}.{kind}" for task in tasks for kind in ("yaml", "jsonl")]
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.exists()}


def known_tokens(lm: GridLM) -> tuple[int, list[int]]:
    """What tells tokenizers apart: how many tokens there are, and those of a text."""
    text = "The quick brown fox: 0123456789, Straße, 漢字."
    return len(lm.tokenizer), list(lm.tokenizer(text).input_ids)


def _samples(suite: str, tasks: list[Task], lm: GridLM, source: Source) -> list[Sample]:
    return [
        sample
        for task in tasks
        for sample in samples_of_task(suite, task, lm, source.limit, source.chat)
    ]


def _tasks_in(folder: Path, names: list[str]) -> list[Task]:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    with warnings.catch_warnings():  # of a library that would like a faster one
        warnings.filterwarnings("ignore", message="Using slow pure-python SequenceMatcher")
        loaded = manager.load(names)["tasks"]
    return [loaded[name] for name in names]


def _unknown(name: str, known: Sequence[str]) -> str:
    return unknown_task(name, known, SUITES)


def _ruler(name: str, lm: GridLM, source: Source, folder: Path) -> list[str]:
    """`ruler`, a task of it at all lengths (`ruler_vt`), or at one (`ruler_vt_4096`)."""
    lengths = lengths_of(name, source)
    task = name.removesuffix(f"_{lengths[0]}")
    has_text = source.data is not None and any(source.data.glob("*.txt"))
    return write_ruler(
        folder,
        lm.tokenizer,
        tasks=None if task == "ruler" else [task],
        lengths=lengths,
        per_task=source.limit,
        seed=source.seed,
        essays=source.data if has_text else None,
    )


def _longbench(name: str, lm: GridLM, source: Source, folder: Path) -> list[str]:
    """`longbench`, all tasks whose files the data folder has (or all of the hub), or one task."""
    tasks = [name]
    if name == "longbench":
        tasks = list(LONGBENCH)
        if source.data is not None:
            tasks = [task for task in LONGBENCH if (source.data / f"{task}.jsonl").is_file()]
            if not tasks:
                raise EvaluationError(f"expected LongBench's <task>.jsonl files in {source.data}")
    return write_longbench(
        folder,
        source.data,
        lm.tokenizer,
        tasks=tasks,
        context=lm.max_length - (_template_tokens(lm) if source.chat else 0),
        limit=source.limit,
    )


def _template_tokens(lm: GridLM) -> int:
    """Tokens that the chat template adds to a prompt, and some for what it may merge."""
    plain = "Hello"
    filled = lm.apply_chat_template([{"role": "user", "content": plain}])
    return max(len(lm.tok_encode(filled)) - len(lm.tok_encode(plain)), 0) + 8


def _local(name: str, lm: GridLM, source: Source, folder: Path) -> list[str]:
    options: dict[str, Any] = {
        "per_task": source.limit,
        "lengths": source.lengths,
        "seed": source.seed,
    }
    return _chosen(name, "local", write_local_suite(folder, lm.tokenizer, **options))


def _choice(name: str, lm: GridLM, source: Source, folder: Path) -> list[str]:
    names = write_choice_suite(folder, per_task=source.limit, seed=source.seed)
    return _chosen(name, "choice", names)


def _chosen(name: str, suite: str, tasks: list[str]) -> list[str]:
    if name not in (suite, *tasks):
        raise EvaluationError(_unknown(name, tasks))
    return tasks if name == suite else [name]


_WRITERS: dict[str, Callable[[str, GridLM, Source, Path], list[str]]] = {
    "ruler": _ruler,
    "longbench": _longbench,
    "local": _local,
    "choice": _choice,
}
