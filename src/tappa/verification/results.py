"""What a verification found, and its verdict."""

import json
import math
from dataclasses import dataclass, field, fields
from typing import Any

from tappa.errors import VerificationError
from tappa.files import finite
from tappa.verification.bounds import BoundResult
from tappa.verification.constructed import Constructed
from tappa.verification.observations import Observation
from tappa.verification.relocation import Relocation
from tappa.verification.seasons import MovedResonance
from tappa.verification.sensitivity import LayerNeed, RankCorrelation


@dataclass(frozen=True)
class Verified:
    """What was found; parts that were not asked for are empty."""

    model: dict[str, Any]
    tokens: int
    bounds: list[BoundResult] = field(default_factory=list)
    relocations: list[Relocation] = field(default_factory=list)
    constructed: list[Constructed] = field(default_factory=list)
    observations: list[Observation] = field(default_factory=list)
    resonances: list[MovedResonance] = field(default_factory=list)
    sensitivity: list[RankCorrelation] = field(default_factory=list)
    needs: list[LayerNeed] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        found = [f"{len(getattr(self, name))} {name}" for name in PARTS if getattr(self, name)]
        verdict = "passed" if self.passed else "failed"
        return f"<Verified {self.model.get('name')}: {verdict}; {', '.join(found) or 'nothing'}>"

    @property
    def passed(self) -> bool:
        """No bound is violated, and every relocation that can be tested is within 1%.

        Made-up heads count too. What the paper observed is reported, and has no verdict.
        """
        verdicts = [
            *(bound.verdict for bound in self.bounds),
            *(moved.verdict for moved in self.relocations),
            *(head.verdict for head in self.constructed),
        ]
        return "fail" not in verdicts

    @classmethod
    def of(cls, content: dict[str, Any]) -> "Verified":
        """What `to_json` wrote, read by json. Raises VerificationError for anything else."""
        try:
            parts = {name: [_read(kind, x) for x in content[name]] for name, kind in PARTS.items()}
            return cls(content["model"], content["tokens"], **parts, notes=content["notes"])
        except Exception as error:  # a field that is missing, or of another kind
            kind = type(error).__name__
            raise VerificationError(f"expected a verification of tappa, got {kind}") from error

    def to_json(self) -> str:
        """Everything, for machines; what is not a number is null."""
        content = {
            "schema": "tappa.verification/1",
            "model": self.model,
            "tokens": self.tokens,
            "passed": self.passed,
            "bounds": [vars(x) | {"verdict": x.verdict} for x in self.bounds],
            "relocations": [vars(x) | {"error": x.error} for x in self.relocations],
            "constructed": [vars(x) | {"verdict": x.verdict} for x in self.constructed],
            "observations": [vars(x) for x in self.observations],
            "resonances": [vars(x) for x in self.resonances],
            "sensitivity": [vars(x) for x in self.sensitivity],
            "needs": [vars(x) for x in self.needs],
            "notes": self.notes,
        }
        return json.dumps(finite(content), indent=1, allow_nan=False) + "\n"


PARTS: dict[str, type] = {
    "bounds": BoundResult,
    "relocations": Relocation,
    "constructed": Constructed,
    "observations": Observation,
    "resonances": MovedResonance,
    "sensitivity": RankCorrelation,
    "needs": LayerNeed,
}


def _read(kind: type, content: dict[str, Any]) -> Any:
    """One result; verdicts and errors follow from its fields, and a bound that is null is NaN."""
    found = {field.name: content[field.name] for field in fields(kind)}
    if kind is BoundResult and found["tightness"] is None:
        found["tightness"] = math.nan
    return kind(**found)
