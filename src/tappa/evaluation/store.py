"""What a folder of results holds: `grid.json`, and a file for every sample with its answers."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tappa.compression import spelled_out
from tappa.errors import CompressionError, EvaluationError
from tappa.evaluation.shared_prefill import Cell
from tappa.files import difference, made_folder, write_atomic

SCHEMA = 1
ANSWER = {"method", "budget", "scores", "tokens_held", "nbytes"}  # what every answer has
RECORD = {"suite", "task", "number", "digest", "prefill_seconds", "cells_seconds", "answers"}
Record = dict[str, Any]  # the content of a sample's file
Say = Callable[[str], None]


@runtime_checkable
class Asked(Protocol):
    """What names a sample: a Sample, or its name alone where the sample is elsewhere."""

    @property
    def task(self) -> str: ...
    @property
    def number(self) -> int: ...
    @property
    def digest(self) -> str: ...


@dataclass(frozen=True)
class SampleName:
    """A sample that is made elsewhere."""

    task: str
    number: int
    digest: str

    @classmethod
    def of(cls, sample: Asked) -> "SampleName":
        """The name of a sample."""
        return cls(sample.task, sample.number, sample.digest)


Key = tuple[str, int | float | None]  # what an answer means: its method spelled out, its budget


def key_of(method: str, budget: int | float | None) -> Key:
    """Two cells with the same key have the same answers: `cake` and `cake(kernel=5)`."""
    try:
        return spelled_out(method), budget
    except CompressionError:  # of another version
        return method, budget


def key_of_answer(answer: dict[str, Any]) -> Key:
    """The key of the cell of an answer; old files do not spell out their methods."""
    if "spelled" in answer:
        return answer["spelled"], answer["budget"]
    return key_of(answer["method"], answer["budget"])


# ---- files of samples


def as_answer(cell: Cell, scored: dict[str, Any], held: dict[str, float]) -> dict[str, Any]:
    """What is written of a sample in a cell."""
    return asdict(cell) | {"spelled": key_of(cell.method, cell.budget)[0]} | scored | held


def sample_file(folder: Path, sample: Asked) -> Path:
    """Where the answers to a sample are."""
    return folder / "samples" / sample.task / f"{sample.number:05}.json"


def read_record(path: Path) -> Record | None:
    """The content of a sample's file, None where it is damaged: cut, or not of this schema.

    Raises EvaluationError for a file that cannot be read at all.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise EvaluationError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        record = json.loads(content)
    except ValueError:  # UnicodeDecodeError too
        return None
    if not isinstance(record, dict) or record.get("schema") != SCHEMA or RECORD - record.keys():
        return None
    answers = record["answers"]
    return record if isinstance(answers, list) and all(map(_is_answer, answers)) else None


def _is_answer(answer: Any) -> bool:
    return isinstance(answer, dict) and answer.keys() >= ANSWER and bool(answer["scores"])


def missing_cells(
    folder: Path, samples: Iterable[Asked], cells: Sequence[Cell], say: Say
) -> dict[SampleName, list[Cell]]:
    """The cells that each sample still lacks. A damaged file is set aside, and `say` tells.

    Raises EvaluationError where a file answers another prompt, or where a damaged one cannot be
    renamed.
    """
    wanted = {cell: key_of(cell.method, cell.budget) for cell in cells}
    missing = {}
    for sample in samples:
        record = _sound_record(sample_file(folder, sample), say)
        if record is not None and record["digest"] != sample.digest:
            raise EvaluationError(f"{sample_file(folder, sample)} answers another prompt")
        there = set() if record is None else set(map(key_of_answer, record["answers"]))
        missing[SampleName.of(sample)] = [cell for cell in cells if wanted[cell] not in there]
    return missing


def _sound_record(path: Path, say: Say) -> Record | None:
    if not path.exists():
        return None
    record = read_record(path)
    if record is None:
        aside = path.with_name(f"{path.name}.damaged")
        try:
            path.replace(aside)
        except OSError as error:
            what = f"cannot set the damaged file {path} aside: {error.strerror}"
            raise EvaluationError(what) from error
        say(f"{path} is damaged: now {aside.name}, its sample is answered again")
    return record


def write_record(folder: Path, sample: Asked, record: Record) -> None:
    """Write the answers to a sample, atomically, beside those that its file has already.

    Raises OutputError.
    """
    path = sample_file(folder, sample)
    there = read_record(path) if path.exists() else None
    if there is not None and there["digest"] == record["digest"]:
        record = joined([there, record])
    with made_folder(path.parent):
        write_atomic(path, json.dumps(record))


def joined(records: Sequence[Record]) -> Record:
    """Records of one sample in different cells as one; of two answers of a cell the first."""
    answers: dict[Key, dict[str, Any]] = {}
    for record in records:
        for answer in record["answers"]:
            answers.setdefault(key_of_answer(answer), answer)
    seconds = {
        name: round(sum(record[name] for record in records), 4)
        for name in ("prefill_seconds", "cells_seconds")
    }
    return records[0] | seconds | {"answers": list(answers.values())}


# ---- grid.json


def start_run(
    folder: Path, identity: dict[str, Any], asked: dict[str, Any], run: dict[str, Any]
) -> None:
    """Write `grid.json` where there is none, or check it: `identity` is what no folder mixes.

    Raises EvaluationError where the folder has answers of another identity, naming the first
    difference.
    """
    known = read_grid(folder)
    if known is None or not has_answers(folder):
        content = {"schema": SCHEMA, "identity": identity, "asked": asked, "run": run}
        _write_grid(folder, content | {"tasks": _settings(asked), "later": []})
        return
    now = _plain(identity)
    there = now | known["identity"]
    if there["weights"] == now["weights"]:
        there["model"] = now["model"]  # the same model in another place
    if found := difference(there, now):
        raise EvaluationError(
            f"{folder} holds results of another grid: {found}; choose another output folder"
        )


def note_asked(folder: Path, asked: dict[str, Any], run: dict[str, Any]) -> None:
    """Say in `grid.json` what was asked last, and how answers of later runs came about."""
    known = read_grid(folder)
    if known is None:
        return
    entry = _plain(run | {"asked": asked})
    last = (known["later"] or [known["run"] | {"asked": known["asked"]}])[-1]
    if {**last, "started": 0} != {**entry, "started": 0}:
        known["later"].append(entry)
    tasks = known["tasks"] | _settings(asked)
    _write_grid(folder, known | {"asked": asked, "tasks": tasks})


def check_prompts(folder: Path, samples: Iterable[Asked], asked: dict[str, Any]) -> None:
    """Whether what is there answers these prompts. Raises EvaluationError, saying what differs."""
    for sample in samples:
        path = sample_file(folder, sample)
        record = read_record(path) if path.exists() else None
        if record is not None and record["digest"] != sample.digest:
            reason = _other_prompts(folder, asked)
            raise EvaluationError(
                f"{path} answers another prompt: {reason}; choose another output folder"
            )


def _other_prompts(folder: Path, asked: dict[str, Any]) -> str:
    """Why, as far as `grid.json` knows."""
    known = (read_grid(folder) or {"tasks": {}})["tasks"]
    for name, settings in _settings(asked).items():
        if name in known and (found := difference(known[name], settings)):
            return f"for {name} {found}"
    return "its data changed, or the version of tappa, Python or lm-eval that makes it"


def _settings(asked: dict[str, Any]) -> dict[str, Any]:
    """What prompts are made of, of every task."""
    settings = {"lengths": asked["lengths"], "data": asked["data"]}
    return dict.fromkeys(asked["tasks"], settings)


def read_grid(folder: Path) -> dict[str, Any] | None:
    """What `grid.json` holds, of earlier versions too; None without one, or without answers to it.

    Raises EvaluationError for one that is damaged or of a later version beside answers.
    """
    path = folder / "grid.json"
    try:
        found = json.loads(path.read_bytes())
        identity, run = dict(found["identity"]), dict(found["run"])
        if found["schema"] != SCHEMA:
            raise ValueError(f"schema {found['schema']}")
        of_before = _of_before(identity, run) if "source" in identity else {}
        return {"later": [], **found, **of_before}
    except (OSError, ValueError, LookupError, TypeError) as error:
        if not has_answers(folder):
            return None  # nothing hangs on it
        raise EvaluationError(
            f"expected the description of the answers in {path}, which is missing, damaged or of "
            "another version; choose another output folder"
        ) from error


def _of_before(old: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """The parts of a `grid.json` whose identity had all that was asked, as they are now."""
    source = old["source"]
    identity = {name: old[name] for name in ("model", "weights", "dtype")}
    identity |= {name: source[name] for name in ("seed", "chat")}
    if source["chat"]:
        identity["template"] = run["chat_template"]
    asked = {name: old[name] for name in ("methods", "budgets", "tasks", "half")}
    asked |= {name: source[name] for name in ("limit", "lengths", "data")}
    return {"identity": identity, "asked": asked, "tasks": _settings(asked)}


def has_answers(folder: Path) -> bool:
    """Whether any sample has a file."""
    return any((folder / "samples").glob("*/*.json"))


def _write_grid(folder: Path, content: dict[str, Any]) -> None:
    with made_folder(folder):
        write_atomic(folder / "grid.json", json.dumps(content, indent=1))


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """As JSON has it: tuples are lists."""
    found: dict[str, Any] = json.loads(json.dumps(value))
    return found
