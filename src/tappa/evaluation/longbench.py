"""LongBench as a suite of lm-eval: its own task files, templates and metrics, on local data.

Source: Bai et al. 2024, "LongBench: A Bilingual, Multitask Benchmark for Long Context
Understanding", https://aclanthology.org/2024.acl-long.172; https://github.com/THUDM/LongBench.
"""

import difflib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tappa.errors import EvaluationError, TextError
from tappa.files import ensure_folder, write_atomic
from tappa.texts import read_lines

PREFIX = "longbench_"
TASKS = (
    "narrativeqa",
    "qasper",
    "multifieldqa_en",
    "multifieldqa_zh",
    "hotpotqa",
    "2wikimqa",
    "musique",
    "dureader",
    "gov_report",
    "qmsum",
    "multi_news",
    "vcsum",
    "trec",
    "triviaqa",
    "samsum",
    "lsht",
    "passage_count",
    "passage_retrieval_en",
    "passage_retrieval_zh",
    "lcc",
    "repobench-p",
)
CLASSIFIED = ("trec", "lsht")  # scored against the names of all classes
FIELDS = ("input", "context", "answers", "all_classes")  # what a line must hold

Record = dict[str, Any]


@dataclass(frozen=True)
class Template:
    """lm-eval's own file of a task, its prompt, and how many tokens it generates."""

    path: Path
    prompt: str
    max_gen_toks: int


def write_longbench(
    folder: Path,
    data: Path | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tasks: Sequence[str] | None = None,
    context: int,
    limit: int | None = None,
) -> list[str]:
    """Write LongBench tasks to `folder`, named as in lm-eval (`longbench_qasper`).

    `data` is a folder with the official `<task>.jsonl` of each of `tasks` (all 21 by default).
    Their prompts are built here, from lm-eval's templates, and one of more than
    `context - max_gen_toks` tokens loses its middle as in LongBench's pred.py (see
    `truncate_middle`); `folder` gets them as JSONL, and YAML files that include lm-eval's own for
    all else. Only the first `limit` lines are read, if it is given. A chat template is not counted.
    The YAML files name files by their absolute path.

    Without `data` the tasks name the data set on the hub, as lm-eval does: nothing is fetched here,
    and lm-eval itself would cut too long prompts on the left. Returns the names of the tasks.

    Raises EvaluationError for an unknown task, a missing folder or file, a line that is not JSON or
    lacks a field, and a context too small for the tokens to be generated, and OutputError.
    """
    names = list(dict.fromkeys(_task_named(name) for name in (TASKS if tasks is None else tasks)))
    templates = {name: _template(name) for name in names}
    if data is not None:
        data = Path(data)
        paths = {name: _data_file(data, name) for name in names}  # all of them before any work
        for name, template in templates.items():
            if context < template.max_gen_toks + 2:
                wanted = (
                    f"more than the {template.max_gen_toks} tokens that {PREFIX}{name} generates"
                )
                raise EvaluationError(f"expected a context of {wanted}, got {context}")
    folder = ensure_folder(folder).absolute()
    for name, template in templates.items():
        yaml = f"include: {_quoted(template.path)}\ntask: {_quoted(PREFIX + name)}\n"
        if data is not None:
            lines = _prompts(name, template, paths[name], tokenizer, context, limit)
            copy = write_atomic(folder / f"{PREFIX}{name}.jsonl", "".join(lines))
            yaml += (
                "dataset_path: json\ndataset_name: null\n"
                f"dataset_kwargs: {{data_files: {{test: {_quoted(copy)}}}}}\n"
                'doc_to_text: "{{prompt}}"\n'
            )
        write_atomic(folder / f"{PREFIX}{name}.yaml", yaml)
    return [PREFIX + name for name in names]


def truncate_middle(prompt: str, tokenizer: PreTrainedTokenizerBase, limit: int) -> str:
    """The prompt, or its first and last `limit // 2` tokens, decoded, where it has more.

    As pred.py of LongBench does. Decoded tokens can be encoded as more of them (a character cut in
    two becomes others): then so many fewer are kept that the result has at most `limit`.
    """
    ids = tokenizer(prompt, verbose=False).input_ids
    cut, count, room = prompt, len(ids), limit
    while count > limit and room > 1:
        half = room // 2
        parts = (ids[:half], ids[-half:])
        cut = "".join(str(tokenizer.decode(part, skip_special_tokens=True)) for part in parts)
        count = len(tokenizer(cut, verbose=False).input_ids)
        room -= max(count - limit, 2)
    return cut


def _task_named(name: str) -> str:
    short = name.removeprefix(PREFIX)
    if short not in TASKS:
        near = difflib.get_close_matches(short, TASKS, n=3, cutoff=0.0)
        raise EvaluationError(f"expected a LongBench task such as {', '.join(near)}, got {name!r}")
    return short


def _template(name: str) -> Template:
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    path = Path(lm_eval.tasks.__file__).parent / "longbench" / f"{name}.yaml"
    task = load_yaml(path, resolve_func=False)
    return Template(path, task["doc_to_text"], task["generation_kwargs"]["max_gen_toks"])


def _data_file(data: Path, name: str) -> Path:
    if not data.is_dir():
        raise EvaluationError(f"expected a folder with LongBench's JSONL files, got {data}")
    path = data / f"{name}.jsonl"
    if not path.is_file():
        found = sorted(other.name for other in data.glob("*.jsonl"))
        near = difflib.get_close_matches(path.name, found, n=3, cutoff=0.0)
        has = f"has {', '.join(near)}" if near else "has no *.jsonl"
        raise EvaluationError(f"expected {path.name} in {data}, which {has}")
    return path


def _prompts(
    name: str,
    template: Template,
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    limit: int | None,
) -> list[str]:
    """The lines of the copy of a data file: the prompts, what scores them, and where from."""
    from lm_eval.utils import apply_template

    lines = []
    for record in itertools.islice(_records(path, classified=name in CLASSIFIED), limit):
        fields = {"context": record["context"], "question": record["input"]}
        prompt = apply_template(template.prompt, fields)
        line = {
            "prompt": truncate_middle(prompt, tokenizer, context - template.max_gen_toks),
            "question": record["input"],
            "answers": record["answers"],
            "all_classes": record["all_classes"] or [],
            "length": record.get("length"),
            "_id": record.get("_id"),
        }
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return lines


def _records(path: Path, *, classified: bool) -> Iterator[Record]:
    """The records of a file, of which only so much is read as is wanted."""
    empty = True
    try:
        for number, line in enumerate(read_lines(path), start=1):
            if line.strip():
                empty = False
                yield _record(line, f"{path}, line {number}", classified)
    except TextError as error:
        raise EvaluationError(str(error)) from error
    if empty:
        raise EvaluationError(f"expected text, got an empty file: {path}")


def _record(line: str, where: str, classified: bool) -> Record:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        what = f"{error.msg} at column {error.colno}"
        raise EvaluationError(f"expected JSON in {where}: {what}") from error
    if not isinstance(record, dict):
        raise EvaluationError(f"expected a JSON object in {where}, got {line.strip()[:40]}")
    for field in FIELDS:
        if field not in record:
            raise EvaluationError(f"expected the field {field!r} in {where}")
        kind, right = _kind_of(field, record[field], classified)
        if not right:
            raise EvaluationError(f"expected {kind} as the field {field!r} in {where}")
    return record


def _kind_of(field: str, value: object, classified: bool) -> tuple[str, bool]:
    """What the value of a field must be, and whether it is."""
    if field in ("input", "context"):
        return "a string", isinstance(value, str)
    if field == "all_classes" and not classified and not value:
        return "null", True  # as the official files have it
    strings = isinstance(value, list) and all(isinstance(item, str) for item in value)
    return "a list of strings", strings and bool(value)


def _quoted(value: str | Path) -> str:
    return json.dumps(str(value), ensure_ascii=False)
