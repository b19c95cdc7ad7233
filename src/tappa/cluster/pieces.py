"""The state of a job that is merged from numbered pieces: a folder, and no database."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from tappa.errors import ClusterError
from tappa.files import difference, ensure_folder, write_atomic

Sums = TypeVar("Sums")


@dataclass
class Pieces(Generic[Sums]):
    """Pieces `0 ... total - 1`, merged from the first on, in their order whatever comes first.

    Each is written at once when it comes. `merged-00007` in the folder is the sum of the first
    seven, whose own files are gone; later pieces wait in files of their own. So the folder stays
    small, and a run that was killed goes on where it was. Without a folder all is in memory.
    """

    total: int
    merge: Callable[[Sums, Sums], Sums]
    write: Callable[[Sums, Path], Any]
    read: Callable[[Path], Sums]
    folder: Path | None = None
    merged: Sums | None = None
    count: int = 0  # pieces in `merged`
    waiting: dict[int, Sums | Path] = field(default_factory=dict)

    def open(self, identity: dict[str, Any]) -> None:
        """Take up what the folder has. Raises ClusterError where it is of another job."""
        if self.folder is None:
            return
        notes = self.folder / "job.json"
        if notes.exists():
            self._check(notes, identity)
        ensure_folder(self.folder)
        write_atomic(notes, json.dumps(identity, indent=1))
        for half_written in self.folder.glob(".*.part"):
            half_written.unlink()
        files = {path.name: path for path in self.folder.glob("*-*[0-9]")}
        for name in sorted(name for name in files if name.startswith("merged-")):
            count = int(name.removeprefix("merged-"))
            if count > self.count:
                self.merged, self.count = self.read(files[name]), count
        for name, path in files.items():
            if name.startswith("piece-") and int(name.removeprefix("piece-")) >= self.count:
                self.waiting[int(name.removeprefix("piece-"))] = path
            elif name != f"merged-{self.count:05}":
                path.unlink()  # of a run that was killed before it could
        self._fold()

    @property
    def missing(self) -> list[int]:
        """Pieces that nobody has done yet."""
        return [n for n in range(self.count, self.total) if n not in self.waiting]

    def add(self, number: int, piece: Sums) -> None:
        """A piece that is done. Raises OutputError."""
        if self.folder is None or number == self.count:
            self.waiting[number] = piece
        else:
            path = self.folder / f"piece-{number:05}"
            self.write(piece, path)
            self.waiting[number] = path
        self._fold()

    def result(self) -> Sums:
        """The sum of all."""
        assert self.merged is not None
        assert self.count == self.total
        return self.merged

    def _fold(self) -> None:
        before, gone = self.count, list[Path]()
        while self.count in self.waiting:
            found = self.waiting.pop(self.count)
            if isinstance(found, Path):
                gone.append(found)
                found = self.read(found)
            self.merged = found if self.merged is None else self.merge(self.merged, found)
            self.count += 1
        if self.folder is None or self.count == before:
            return
        assert self.merged is not None
        self.write(self.merged, self.folder / f"merged-{self.count:05}")
        for path in [*gone, self.folder / f"merged-{before:05}"]:
            path.unlink(missing_ok=True)

    def _check(self, notes: Path, identity: dict[str, Any]) -> None:
        try:
            known = json.loads(notes.read_text(encoding="utf-8"))
            found = difference(known, identity)
        except (OSError, ValueError, AttributeError) as error:
            raise ClusterError(f"cannot read {notes}: {error}") from error
        if found:
            raise ClusterError(
                f"{self.folder} holds pieces of another job: {found}; choose another output folder"
            )
