"""Theorem 5.4 on prompts that repeat: does attention resonate where theory says?

In a prompt of period B, queries and keys before RoPE repeat (nearly) every L = B, 2B, 3B, ... What
still keeps a head from repeating after L keys is RoPE: the difference of two logits, L keys apart,
is at most `sum_m chord(L theta_m) |q^m| |k^m|` where they repeat exactly, and the dominant
channel's term vanishes at resonance, `L theta = 2 pi n`.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tappa.attention_profile import SINK_TOKENS
from tappa.capture import LayerView, prefill
from tappa.channels import best_season
from tappa.texts import encode_texts
from tappa.verification.relocation import TARGETS, channel_moved, dominant_of, view_of

BLOCKS = (7, 31)  # tokens of the blocks that are repeated
MIN_SEASONS = 4  # of the lags L that are compared
ROWS = 64  # rows of each head whose logits are compared, the last ones


@dataclass(frozen=True)
class RepeatingPrompt:
    """A prompt whose tokens, or at least whose lines, repeat every `period` tokens."""

    kind: str
    period: int
    ids: list[int]

    @property
    def lags(self) -> list[int]:
        """The multiples of the period that are compared: up to half of the prompt."""
        return list(range(self.period, len(self.ids) // 2 + 1, self.period))


@dataclass(frozen=True)
class MovedResonance:
    """A head whose dominant channel was moved, on a prompt that repeats: lags and two curves.

    `change` and `expected` are `Resonance`'s `change` and `dominant` at each lag.
    """

    layer: int
    head: int
    target: int
    lags: list[int]
    change: list[float]
    expected: list[float]


@dataclass
class Resonance:
    """What a prompt shows of every head: a consumer for `prefill`.

    `change` is the mean `|a[t, i+L] - a[t, i]|` of logits over the last rows t and all keys i, in
    shares of the mean energy `sum_m |q^m| |k^m|`; `all_channels` and `dominant` are what theory
    says of it: `sum_m e_m chord(L theta_m)` with e the shares of energy, and the term of the
    dominant channel alone. `repeats` is the mean cosine of queries and of keys before RoPE, L
    apart; `season` the lag at which `tappa analyze` finds that they repeat best.
    """

    lags: Sequence[int]
    rows: int = ROWS
    parts: dict[str, list[Tensor]] = field(default_factory=dict)

    def __call__(self, view: LayerView) -> None:
        """Take in one layer."""
        for name, value in resonance_of(view, self.lags, self.rows).items():
            self.parts.setdefault(name, []).append(value.double().cpu())

    def curves(self, name: str) -> Float[np.ndarray, "heads *lags"]:
        """One line for each head, layer by layer (of `season`: one number)."""
        return torch.cat(self.parts[name]).numpy()


def repeating_prompts(
    tokenizer: PreTrainedTokenizerBase, text: str, tokens: int
) -> list[RepeatingPrompt]:
    """Blocks of a text repeated word for word, lines of a table, and lines of code.

    Of the lines only those of the most frequent length in tokens are taken, so that their period
    is known. A kind is left out where too few seasons fit into `tokens`.
    """
    ids = encode_texts(tokenizer, [text], max(tokens, 64 + max(BLOCKS)))[0]
    found = [
        RepeatingPrompt(f"block of {size}", size, (ids[64 : 64 + size] * tokens)[:tokens])
        for size in BLOCKS
        if len(ids) >= 64 + size
    ]
    rows = (f"| {n:03} | {n * 37 % 1000:03} | {'yes' if n % 3 else 'no'} |\n" for n in range(4000))
    code = (f"    self.field_{n:03} = values[{n * 13 % 1000:03}]\n" for n in range(4000))
    for kind, lines in (("table", rows), ("code", code)):
        found += _of_equal_lines(tokenizer, kind, lines, tokens)
    return [prompt for prompt in found if len(prompt.lags) >= MIN_SEASONS]


def _of_equal_lines(
    tokenizer: PreTrainedTokenizerBase, kind: str, lines: Iterable[str], tokens: int
) -> list[RepeatingPrompt]:
    encoded = [tokenizer(line, add_special_tokens=False)["input_ids"] for line in lines]
    period, count = Counter(map(len, encoded)).most_common(1)[0]
    if period * count < tokens:
        return []
    ids = [token for line in encoded if len(line) == period for token in line]
    return [RepeatingPrompt(f"{kind}, {period} tokens a line", period, ids[:tokens])]


def resonance_of(view: LayerView, lags: Sequence[int], rows: int = ROWS) -> dict[str, Tensor]:
    """The figures of `Resonance` for the heads of one layer: each (heads, lags)."""
    heads, steps, dim = view.queries.shape
    group = heads // len(view.keys)
    plain_q, plain_k = view.queries_before, view.keys_before
    at = torch.arange(max(steps - rows, SINK_TOKENS), steps, device=view.queries.device)
    grouped = view.queries[:, at].view(len(view.keys), group, len(at), dim)
    keys = view.keys[:, None].mT.expand(-1, group, -1, -1)
    logits = torch.matmul(grouped, keys).view(heads, len(at), -1)  # before scale and softcap
    query_norms = view.rotary.norms(plain_q[:, at]).mean(1)
    key_norms = view.rotary.norms(plain_k[:, SINK_TOKENS:]).mean(1).repeat_interleave(group, 0)
    energy = query_norms * key_norms  # (heads, channels)
    shares = energy / energy.sum(1, keepdim=True).clamp_min(1e-30)
    rotated = len(view.rotary.theta)
    dominant = shares[:, :rotated].argmax(1, keepdim=True)
    found: dict[str, list[Tensor]] = {name: [] for name in ("change", "all_channels", "dominant")}
    found["repeats"] = []
    season = best_season(normalize(plain_q, dim=-1), normalize(plain_k, dim=-1), steps)
    columns = torch.arange(steps, device=at.device)
    for lag in lags:
        pairs = (columns[SINK_TOKENS + lag :] <= at[:, None]) & view.attention.visible(
            at, columns[SINK_TOKENS : steps - lag]
        )
        change = (logits[..., SINK_TOKENS + lag :] - logits[..., SINK_TOKENS : steps - lag]).abs()
        mean = (change * pairs).sum((1, 2)) / pairs.sum().clamp_min(1)
        chords = view.rotary.chord(lag).to(shares)  # of all channels, 0 where nothing is rotated
        found["change"].append(mean / energy.sum(1).clamp_min(1e-30))
        found["all_channels"].append((shares * chords).sum(1))
        found["dominant"].append((shares * chords).gather(1, dominant)[:, 0])
        found["repeats"].append(
            (_repeats(plain_q, lag) + _repeats(plain_k, lag).repeat_interleave(group, 0)) / 2
        )
    return {name: torch.stack(values, 1) for name, values in found.items()} | {"season": season}


def _repeats(x: Float[Tensor, "heads steps dim"], lag: int) -> Float[Tensor, " heads"]:
    x = x[:, SINK_TOKENS:]
    return torch.cosine_similarity(x[:, lag:], x[:, :-lag], dim=-1).mean(1)


def measure_resonance(
    model: PreTrainedModel, prompt: RepeatingPrompt, rows: int = ROWS
) -> Resonance:
    """What every head does on a prompt that repeats."""
    resonance = Resonance(prompt.lags, rows)
    prefill(model, torch.tensor([prompt.ids]), resonance, logits_to_keep=1)
    return resonance


def measure_moved(
    model: PreTrainedModel,
    prompt: RepeatingPrompt,
    heads: Sequence[tuple[int, int]],
    targets: Sequence[int] = TARGETS,
) -> list[MovedResonance]:
    """Single heads (layer, head) whose dominant channel is moved to a fast one.

    Dominant channels of real heads are mostly so slow that `chord(L theta)` only grows with L; a
    fast one passes through resonance again and again.
    """
    found = []
    for layer, head in heads:
        plain = view_of(model, prompt.ids, layer)
        source = dominant_of(plain, head)
        for target in targets:
            if target == source or target >= len(plain.rotary.theta):
                continue
            with channel_moved(model, plain, head, source, target):
                figures = resonance_of(view_of(model, prompt.ids, layer), prompt.lags)
            change, expected = (figures[name][head].tolist() for name in ("change", "dominant"))
            found.append(MovedResonance(layer, head, target, prompt.lags, change, expected))
    return found
