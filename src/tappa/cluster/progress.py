"""How far a job is: rate, time left, what failed and what is tried again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

Follow = Callable[[int, int, int, int], None]  # done, total, failed, tried again


def ignore(done: int, total: int, failed: int, retried: int) -> None:
    """Follow nothing."""


class RateColumn(ProgressColumn):
    """Pieces per minute in this run."""

    def render(self, task: Task) -> Text:
        """Called by rich."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{60 * speed:.1f}/min")


class TroubleColumn(ProgressColumn):
    """What failed and what is tried again; nothing where all is well."""

    def render(self, task: Task) -> Text:
        """Called by rich."""
        parts = [
            f"{task.fields[name]} {words}"
            for name, words in (("failed", "failed"), ("retried", "tried again"))
            if task.fields.get(name)
        ]
        return Text(", ".join(parts), style="red" if task.fields.get("failed") else "yellow")


@contextmanager
def following(console: Console, doing: str, what: str) -> Iterator[Follow]:
    """A bar on a terminal, gone when it is done; nothing elsewhere."""
    columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn(), TextColumn(what), RateColumn())
    off = not console.is_terminal
    left, trouble = TimeRemainingColumn(), TroubleColumn()
    with Progress(*columns, left, trouble, console=console, transient=True, disable=off) as bar:
        task = bar.add_task(doing, total=None)
        yield lambda done, total, failed, retried: bar.update(
            task, completed=done, total=total, failed=failed, retried=retried
        )
