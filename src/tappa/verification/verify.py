"""The whole flow of `tappa verify`: claims in, a table and a verdict out."""

import difflib
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tappa.analysis import Analysis, analyze
from tappa.capture import prefill
from tappa.errors import CompressionError, VerificationError
from tappa.tensor_parallel import require_whole
from tappa.texts import encode_texts, packaged_text, packaged_verse
from tappa.verification.bounds import AttentionBound, logit_bounds
from tappa.verification.constructed import check_constructed
from tappa.verification.observations import observe, repeats, resonates, stability
from tappa.verification.pictures import figures
from tappa.verification.presentation import to_markdown
from tappa.verification.relocation import TARGETS, choose_heads, relocate
from tappa.verification.results import Verified
from tappa.verification.seasons import measure_moved, measure_resonance, repeating_prompts
from tappa.verification.sensitivity import NEXT, correlate, layer_needs, measure_sensitivity

__all__ = [
    "CLAIMS",
    "Verification",
    "Verified",
    "figures",
    "kinds_of_text",
    "parse_channel",
    "parse_head",
    "to_markdown",
    "verify",
]
CLAIMS = ("bounds", "relocation", "base", "constructed", "observations", "seasons", "sensitivity")
FACTORS = (0.1, 10.0)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Verification:
    """What is to be verified, and how."""

    claims: Sequence[str] = CLAIMS
    tokens: int = 512
    heads: Sequence[tuple[int, int]] = ()  # (layer, head) to relocate; chosen where empty
    count: int = 6  # heads that are chosen
    targets: Sequence[int] = TARGETS
    prompts: int = 2  # of the sensitivity

    def check(self) -> None:
        """Raises VerificationError, naming the nearest claim."""
        for claim in self.claims:
            if claim not in CLAIMS:
                close = difflib.get_close_matches(claim, CLAIMS, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise VerificationError(
                    f"expected claims of {', '.join(CLAIMS)}, got {claim!r}{hint}"
                )
        if not self.claims:
            raise VerificationError("expected at least one claim")
        if self.tokens < 64:
            raise VerificationError(f"expected at least 64 tokens, got {self.tokens}")
        if self.count < 1 or self.prompts < 1:
            raise VerificationError("expected at least one head and one prompt")


def parse_head(text: str) -> tuple[int, int]:
    """`18.5` -> layer 18, head 5. Raises VerificationError."""
    layer, _, head = text.partition(".")
    if not (layer.isdigit() and head.isdigit()):
        raise VerificationError(f"expected a head as layer.head, such as 18.5, got {text!r}")
    return int(layer), int(head)


def parse_channel(text: str) -> int:
    """Raises VerificationError."""
    if not text.isdigit():
        raise VerificationError(f"expected channels as whole numbers, such as 2,3,5, got {text!r}")
    return int(text)


def kinds_of_text() -> dict[str, str]:
    """Five kinds that every installation has: prose, verse, a manual, code, a table of numbers."""
    source = Path(sysconfig.get_paths()["stdlib"]) / "argparse.py"
    manual = "\n\n".join(topics[name] for name in sorted(topics) if len(topics[name]) > 2000)
    rows = [f"{n},{n * n},{n**3 % 97},{'yes' if n % 3 else 'no'}" for n in range(4000)]
    return {
        "prose": packaged_text(),
        "verse": packaged_verse(),
        "manual": manual,
        "code": source.read_text(encoding="utf-8"),
        "table": "\n".join(["number,square,remainder,flag", *rows]),
    }


def verify(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    wanted: Verification | None = None,
    *,
    texts: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Verified:
    """Check the paper's claims on a model.

    `texts` are kinds of text (name: content), of which the first serves where one is enough;
    `progress(claim, done, total)` follows long ones. The model is as it was afterwards.

        found = verify(model, tokenizer, Verification(claims=["bounds", "relocation"]))
        assert found.passed

    Raises TappaError of several kinds.
    """
    wanted = wanted or Verification()
    wanted.check()
    require_whole(model, "verify claims")
    texts = texts or kinds_of_text()

    def follow(claim: str) -> Callable[[int, int], None]:
        return lambda done, total: progress(claim, done, total) if progress is not None else None

    first = next(iter(texts))
    analyses: dict[str, Analysis] = {}
    for kind in texts if "observations" in wanted.claims else [first]:
        analyses[kind] = analyze(
            *(model, tokenizer, texts[kind]),
            tokens=wanted.tokens,
            progress=follow(f"analysing {kind}"),
        )
    analysis = analyses[first]
    ids = encode_texts(tokenizer, [texts[first]], wanted.tokens)[0]
    found = Verified(analysis.model, len(ids))
    if "bounds" in wanted.claims:
        attention = AttentionBound()
        prefill(model, torch.tensor([ids]), attention, logits_to_keep=1)
        found.bounds.extend([*logit_bounds(analysis), attention.result()])
    factors = [1.0] if "relocation" in wanted.claims else []
    factors += FACTORS if "base" in wanted.claims else []
    if factors:
        with _noted(found, "relocation", wanted):
            heads, targets = _choice(analysis, wanted)
            moved = relocate(model, ids, heads, targets, factors, follow("relocating"))
            found.relocations.extend(moved)
    if "constructed" in wanted.claims:
        found.constructed.extend(check_constructed())
    if "observations" in wanted.claims:
        found.observations.extend([*observe(analysis, len(ids)), *stability(analyses)])
    if "seasons" in wanted.claims:
        _add_seasons(found, model, tokenizer, texts[first], analysis, wanted, follow("repeating"))
    if "sensitivity" in wanted.claims:
        prompts = _prompts(tokenizer, texts[first], wanted)
        with _noted(found, "sensitivity", wanted):
            measured = measure_sensitivity(model, prompts, progress=follow("cutting"))
            found.sensitivity.extend(correlate(measured, analysis))
            found.needs.extend(layer_needs(measured, analysis))
    return found


@contextmanager
def _noted(found: Verified, claim: str, wanted: Verification) -> Iterator[None]:
    """A claim that the model does not let us test is a note; what a caller names must exist."""
    named = bool(wanted.heads) or tuple(wanted.targets) != TARGETS
    try:
        yield
    except CompressionError as error:
        found.notes.append(f"{claim} is untestable: {error}")
    except VerificationError as error:
        if named:
            raise
        found.notes.append(f"{claim} is untestable: {error}")


def _choice(
    analysis: Analysis, wanted: Verification
) -> tuple[Sequence[tuple[int, int]], Sequence[int]]:
    """The heads to alter, and to which channels: of the usual ones those that all heads have."""
    heads = wanted.heads or choose_heads(analysis, wanted.count)
    if tuple(wanted.targets) != TARGETS:
        return heads, wanted.targets
    channels = {layer.layer: len(layer.theta) for layer in analysis.layers}
    fewest = min((channels.get(layer, 0) for layer, _ in heads), default=0)
    return heads, [target for target in TARGETS if target < fewest]


def _add_seasons(
    found: Verified,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    analysis: Analysis,
    wanted: Verification,
    progress: Callable[[int, int], None],
) -> None:
    """All heads on every prompt that repeats, and heads with a channel moved on the first."""
    prompts = repeating_prompts(tokenizer, text, wanted.tokens)
    for done, prompt in enumerate(prompts):
        progress(done, len(prompts))
        found.observations.extend(repeats(prompt, measure_resonance(model, prompt)))
    if not prompts:
        found.notes.append("seasons are untestable: too few of them fit so few tokens")
        return
    with _noted(found, "resonance", wanted):
        heads, targets = _choice(analysis, wanted)
        found.resonances.extend(measure_moved(model, prompts[0], heads, targets))
        found.observations.extend(resonates(found.resonances))


def _prompts(
    tokenizer: PreTrainedTokenizerBase, text: str, wanted: Verification
) -> list[list[int]]:
    """Windows of a text, one after the other, each with the tokens that follow it."""
    size = wanted.tokens + NEXT
    ids = encode_texts(tokenizer, [text], size * wanted.prompts)[0]
    return [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]
