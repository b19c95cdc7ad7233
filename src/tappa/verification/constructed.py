"""Heads made up so that their pattern is known: both labels must say it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tappa.attention_profile import Attention
from tappa.capture import LayerView
from tappa.figures import head_figures
from tappa.layer_statistics import PromptLayer, Settings
from tappa.patterns import name_patterns
from tappa.rope import RotaryChannels

TOKENS, DIM, SEASON = 384, 64, 65  # no multiple of the season fits a third of the tokens
NOISE = (0.0, 0.05, 0.1)  # of queries and keys, in shares of their norm: what is promised
Vectors = tuple[Float[Tensor, "tokens dim"], Float[Tensor, "tokens dim"]]
Make = Callable[[torch.Generator], Vectors]


@dataclass(frozen=True)
class Constructed:
    """A made-up head: what it is, what it was called, and by how much noise."""

    pattern: str
    noise: float
    seed: int
    observed: str
    explained: str

    @property
    def verdict(self) -> str:
        """Whether both labels are right."""
        return "pass" if self.observed == self.explained == self.pattern else "fail"


def channels() -> RotaryChannels:
    """Plain RoPE of base 10,000 over all dimensions."""
    pairs = torch.arange(DIM // 2)
    theta = 10_000.0 ** (-pairs.double() * 2 / DIM)
    return RotaryChannels(pairs, pairs + DIM // 2, theta, torch.arange(0))


def _in_channels(energy: dict[int, float]) -> Float[Tensor, " dim"]:
    x = torch.zeros(DIM)
    for channel, norm in energy.items():
        x[channel] = norm
    return x


def _sink(generator: torch.Generator) -> Vectors:
    """Constant queries that look along the slowest channel, and one key that lies there."""
    query = _in_channels({DIM // 2 - 1: 8.0})
    keys = 0.3 * torch.randn(TOKENS, DIM, generator=generator)
    keys[0] = query
    return query.expand(TOKENS, DIM).clone(), keys


def _diagonal(generator: torch.Generator) -> Vectors:
    """The same vector everywhere, with energy in all channels: logits peak at lag 0."""
    x = torch.zeros(DIM)
    x[: DIM // 2] = 2.5
    return x.expand(TOKENS, DIM).clone(), x.expand(TOKENS, DIM).clone()


def _periodic(generator: torch.Generator) -> Vectors:
    """The same vector everywhere in channel 6, which turns once in 35 tokens."""
    x = _in_channels({6: 8.0})
    return x.expand(TOKENS, DIM).clone(), x.expand(TOKENS, DIM).clone()


def _seasonal(generator: torch.Generator) -> Vectors:
    """SEASON different keys, one after the other, each looked for by a query elsewhere in a season.

    In channels that hardly turn. Were each looked for in its own place, the head would be
    sequential as well.
    """
    kinds = torch.zeros(SEASON, DIM)
    slow = torch.arange(DIM // 2 - 12, DIM // 2)
    for dims in (slow, slow + DIM // 2):
        kinds[:, dims] = torch.randn(SEASON, len(dims), generator=generator)
    kinds = 12 * kinds / kinds.norm(dim=1, keepdim=True)
    at = torch.arange(TOKENS) % SEASON
    wanted = torch.randperm(SEASON, generator=generator)
    return kinds[wanted[at]], kinds[at]


def _random(generator: torch.Generator) -> Vectors:
    """Queries and keys that know nothing of each other."""
    return tuple(4 * torch.randn(TOKENS, DIM, generator=generator) for _ in range(2))  # type: ignore[return-value]


PATTERNS: dict[str, Make] = {
    "re-access": _sink,
    "sequential": _diagonal,
    "periodic": _periodic,
    "seasonal": _seasonal,
    "unpredictable": _random,
}


def construct(pattern: str, noise: float, seed: int) -> LayerView:
    """A layer of one head with this pattern, with Gaussian noise of `noise` times each norm."""
    generator = torch.Generator().manual_seed(seed)
    rotary, positions = channels(), torch.arange(TOKENS)
    parts = []
    for x in PATTERNS[pattern](generator):
        extra = torch.randn(TOKENS, DIM, generator=generator) / DIM**0.5
        x = x + noise * x.norm(dim=1, keepdim=True) * extra
        parts.append(rotary.rotate(x[None], positions))
    return LayerView(0, 0, parts[0], parts[1], rotary, Attention(DIM**-0.5), 0, 0)


def label(view: LayerView) -> tuple[str, str]:
    """(observed, explained) label of the first head of a layer."""
    layer = PromptLayer(Settings())
    layer.add(view)
    names = name_patterns(head_figures(layer.statistics())[0])
    return names["observed"], names["explained"]


def check_constructed(seeds: int = 3) -> list[Constructed]:
    """Every pattern at every level of noise."""
    return [
        Constructed(pattern, noise, seed, *label(construct(pattern, noise, seed)))
        for pattern in PATTERNS
        for noise in NOISE
        for seed in range(seeds)
    ]
