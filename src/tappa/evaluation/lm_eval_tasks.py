"""Tasks of lm-eval by name: those that come with it, and those in a folder of one's own."""

import difflib
from collections.abc import Sequence
from pathlib import Path

from lm_eval.api.task import Task

from tappa.errors import EvaluationError


def own_tasks(folder: Path | None) -> list[str]:
    """Names of the tasks in a folder of lm-eval task files; none without a folder.

    Raises EvaluationError for what is no folder, or has no task.
    """
    from lm_eval.tasks import TaskManager

    if folder is None:
        return []
    if not folder.is_dir():
        raise EvaluationError(f"expected a folder of lm-eval task files, got {folder}")
    try:
        found = list(TaskManager(include_path=str(folder), include_defaults=False).all_tasks)
    except Exception as error:  # YAML that is none
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise EvaluationError(f"cannot read the task files in {folder}: {reason}") from error
    if not found:
        raise EvaluationError(f"expected lm-eval task files (*.yaml) in {folder}, got none")
    return found


def load_tasks(name: str, folder: Path | None, suites: Sequence[str]) -> list[Task]:
    """A task of lm-eval, or of a folder of one's own. Raises EvaluationError."""
    from lm_eval.tasks import TaskManager

    own = own_tasks(folder)
    manager = TaskManager(
        include_path=None if folder is None else str(folder), include_defaults=name not in own
    )
    if name not in manager.all_tasks:
        raise EvaluationError(unknown_task(name, [*own, *suites, *manager.all_tasks], suites))
    try:
        return list(manager.load([name])["tasks"].values())
    except Exception as error:  # no network, no such data: whatever its loader raises
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise EvaluationError(f"cannot load the task {name}: {reason}") from error


def unknown_task(name: str, known: Sequence[str], suites: Sequence[str]) -> str:
    """What to say of a name that is no task, with those of `known` that are near."""
    close = list(dict.fromkeys(difflib.get_close_matches(name, known, n=3)))
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    return f"unknown task {name!r}, expected one of {', '.join(suites)}, or a task of lm-eval{hint}"
