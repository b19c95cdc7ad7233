"""Every figure of one layer as sums that add up over chunks, prompts and workers."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tappa import kernels
from tappa.attention_profile import ADDITIVE, AttentionProfile, attention_profile
from tappa.capture import LayerView
from tappa.channels import ChannelSums, best_season
from tappa.errors import CaptureError, NonFiniteError
from tappa.fetching import Fetched, send
from tappa.query_model import expected_persistence, observed_seasons
from tappa.similarity import SelfSimilarity
from tappa.tensor_parallel import HeadShards
from tappa.theory import BOUNDS, BoundCheck, Layer, check_bounds, spread_rows

SAMPLED_ROWS = 16  # rows of each head and chunk on which bounds and seasons are evaluated,
SAMPLED_KEYS = 32  # and keys for each of them
WITHOUT_HEADS = ("lag_counts",)  # of the arrays, those that do not begin with heads
HEAVY_COLUMNS = 8  # "the few heaviest columns" of a head


@dataclass(frozen=True)
class Settings:
    """What is measured; analyses can be merged only if they agree on it."""

    window: int = 32  # steps of the "window" variants of self-similarity
    lags: int = 1024  # lag profiles hold the distances below this

    def __post_init__(self) -> None:
        for name, value, least in (("window", self.window, 2), ("lags", self.lags, 8)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise CaptureError(f"expected {name} of at least {least}, got {value!r}")


@dataclass
class LayerStatistics:
    """The sums of one layer: arrays with query heads (or KV heads) first; `+` merges them."""

    layer: int
    theta: list[float]  # frequency of every rotated channel, radians per token
    scale: float
    sums: dict[str, np.ndarray] = field(repr=False)

    def __add__(self, other: "LayerStatistics") -> "LayerStatistics":
        if self.theta != other.theta:
            raise CaptureError(
                f"layer {self.layer}: RoPE frequencies differ between prompts (dynamic scaling): "
                "analyse them one by one"
            )
        sums = {name: self.sums[name] + other.sums[name] for name in self.sums}
        return LayerStatistics(self.layer, self.theta, self.scale, sums)

    def of_all_ranks(self, shards: HeadShards, heads: int) -> "LayerStatistics":
        """With the heads of all ranks of a split model, `heads` query heads in all.

        Raises CaptureError where ranks do not hold equally many.
        """
        if shards.ranks == 1:
            return self
        if len(self.sums["vertical"]) * shards.ranks != heads:
            raise CaptureError(
                f"layer {self.layer}: expected {heads} heads in equal parts on {shards.ranks} "
                f"ranks, this one has {len(self.sums['vertical'])}"
            )
        sums = {
            name: x
            if x.ndim == 0 or name in WITHOUT_HEADS
            else shards.gather(torch.from_numpy(x)).numpy()
            for name, x in self.sums.items()
        }
        return LayerStatistics(self.layer, self.theta, self.scale, sums)


@dataclass
class PromptLayer:
    """One layer on one prompt: `add` its chunks in order, then take `statistics`."""

    settings: Settings
    channels: ChannelSums | None = None
    profile: AttentionProfile | None = None
    season: Tensor | None = (
        None  # (heads,) best seasonal lag L, 0 if too short a prompt; on the CPU
    )
    last_query: Tensor | None = None
    border: tuple[int, Tensor] | None = None  # position and value of a key, see _remember_border
    sampled: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.queries = SelfSimilarity(self.settings.window)
        self.keys = SelfSimilarity(self.settings.window)

    def add(self, view: LayerView) -> None:
        """Take in the next chunk of the prompt.

        Raises:
            NonFiniteError: NaN or infinity among the queries or keys.
        """
        season = self.season
        if season is None:
            season = best_season(*_unit_vectors(view), lags=self.settings.lags)
        found = Fetched(torch.cat([send(season, view.model_keys.device), *_non_finite(view)]))
        self._add_profile(view)
        dominant = self._add_vectors(view).dominant()
        # the CPU waits for a GPU here only, which has the profile to work on meanwhile
        self.season = _checked(view, found.get())
        for name, value in _sampled_figures(view, self.season, dominant).items():
            self.sampled[name] = self.sampled[name] + value if name in self.sampled else value
        self.rotary, self.scale, self.layer = view.rotary, view.attention.scale, view.layer

    def _add_vectors(self, view: LayerView) -> ChannelSums:
        """Similarity and channels of the fresh queries and keys."""
        queries, steps = view.model_queries, view.model_queries.shape[1]
        keys = view.model_keys[:, -steps:]
        channels = self.channels = self.channels or ChannelSums(view.rotary)
        sums = kernels.vector_sums(queries, keys, view.rotary, view.query_start)
        if sums is None:
            before = view.keys_before[:, -steps:]
            self.queries.add(view.queries_before, view.queries)
            self.keys.add(before, view.keys[:, -steps:])
            channels.add(view.queries_before, before)
            return channels
        ends = self.queries.ends(steps, queries.device)
        for similarity, x, of in ((self.queries, queries, sums[0]), (self.keys, keys, sums[1])):
            post = x[:, ends].float()
            pre = view.rotary.rotate(post, -(ends + view.query_start))
            similarity.add_sums(of, pre, post, steps)
        channels.add_sums(*sums, steps)
        return channels

    def _add_profile(self, view: LayerView) -> None:
        queries, keys, key_start = view.model_queries, view.model_keys, view.key_start
        if self.border is not None and self.border[0] == key_start - 1:
            keys, key_start = torch.cat([self.border[1], keys], dim=1), key_start - 1
        profile = attention_profile(
            *(queries, keys, view.attention, self.settings.lags),
            *(view.query_start, key_start, self.last_query),
        )
        if self.profile is None:
            self.profile = profile
        else:
            self.profile.add(profile)
        self._remember_border(view)

    def _remember_border(self, view: LayerView) -> None:
        """Keep what the last query sees and a sliding-window cache is about to drop: one key."""
        self.last_query = view.model_queries[:, -1].clone()
        end = view.query_start + view.model_queries.shape[1]
        oldest = end - (view.attention.window or end)
        at = oldest - view.key_start
        self.border = (oldest, view.model_keys[:, at : at + 1].clone()) if at >= 0 else None

    def statistics(self) -> LayerStatistics:
        """The sums of this prompt, ready to be added to those of others."""
        return self.fetch()()

    def fetch(self) -> Callable[[], LayerStatistics]:
        """Have the statistics sent from where they are; the function returned waits for them."""
        assert self.channels is not None
        assert self.profile is not None
        assert self.season is not None
        sums = {**self.channels.statistics(), **self.sampled, **_profile_sums(self.profile)}
        for name, similarity in (("q", self.queries), ("k", self.keys)):
            for variant, (cosines, pairs) in similarity.sums().items():
                sums[f"{name}_cosines_{variant}"] = cosines
                sums[f"{name}_pairs_{variant}"] = torch.tensor(pairs)
        votes = torch.zeros(len(self.season), self.settings.lags, dtype=torch.int64)
        votes[torch.arange(len(self.season)), self.season] = self.profile.rows
        sums["season_votes"] = votes
        sums["theta"], layer, scale = self.rotary.theta, self.layer, self.scale
        sent = _fetch(sums, self.profile.column_mass.device)

        def statistics() -> LayerStatistics:
            arrays = sent()
            for name, array in arrays.items():
                if not np.isfinite(array).all():
                    raise NonFiniteError(f"layer {layer}: {name} is too large for a number")
            return LayerStatistics(layer, arrays.pop("theta").tolist(), scale, arrays)

        return statistics


@dataclass
class PromptReading:
    """All layers on one prompt of so many tokens: `add` their chunks, then take `statistics`.

    A layer that has seen the whole prompt sends its statistics while a GPU works on the next one.
    """

    settings: Settings
    tokens: int
    _layers: dict[int, PromptLayer] = field(default_factory=dict)
    _sent: dict[int, Callable[[], LayerStatistics]] = field(default_factory=dict)

    def add(self, view: LayerView) -> None:
        """Take in the next chunk of a layer."""
        layer = self._layers.setdefault(view.layer, PromptLayer(self.settings))
        layer.add(view)
        if view.query_start + view.model_queries.shape[1] == self.tokens:
            self._sent[view.layer] = self._layers.pop(view.layer).fetch()

    def statistics(self) -> list[LayerStatistics]:
        """Of every layer, in order."""
        assert not self._layers
        return [self._sent[index]() for index in sorted(self._sent)]


def _unit_vectors(view: LayerView) -> tuple[Tensor, Tensor]:
    """Fresh queries and keys before RoPE, as unit vectors."""
    steps = view.model_queries.shape[1]
    queries = kernels.unit_vectors(view.model_queries, view.rotary, view.query_start)
    fresh = view.model_keys[:, -steps:]
    keys = kernels.unit_vectors(fresh, view.rotary, view.query_start)
    if queries is None or keys is None:
        before = view.queries_before, view.keys_before[:, -steps:]
        return normalize(before[0], dim=-1), normalize(before[1], dim=-1)
    return queries, keys


def _fetch(sums: dict[str, Tensor], device: torch.device) -> Callable[[], dict[str, np.ndarray]]:
    """Send all that is on a device in one piece; the function returned waits for it.

    The others are on the CPU.
    """
    chosen = {name: x.contiguous() for name, x in sums.items() if x.device == device}
    there = {name: x.view(-1).view(torch.uint8) for name, x in chosen.items()}
    sent = Fetched(torch.cat([*there.values()]))

    def arrays() -> dict[str, np.ndarray]:
        parts = sent.get().split([len(x) for x in there.values()])
        bytes_of = dict(zip(there, parts, strict=True))
        return {
            name: bytes_of[name].clone().view(x.dtype).view(x.shape).numpy()
            if name in there
            else x.numpy()
            for name, x in sums.items()
        }

    return arrays


def _non_finite(view: LayerView) -> list[Tensor]:
    """Whether there is NaN or infinity in the queries of each head and the keys of each KV head."""
    vectors = view.model_queries, view.model_keys
    return [~torch.isfinite(x.sum((1, 2), dtype=torch.float64)) for x in vectors]


def _checked(view: LayerView, found: Tensor) -> Tensor:
    """The seasons, which come first. Stops at the first NaN or infinity, naming layer and head."""
    heads = len(view.model_queries)
    parts = found.split([heads, heads, len(view.model_keys)])
    for name, head, flags in zip(("queries", "keys"), ("head", "KV head"), parts[1:], strict=True):
        if flags.any():
            raise NonFiniteError(
                f"expected finite {name}, found NaN or infinity in layer {view.layer}, "
                f"{head} {int(flags.argmax())}"
            )
    return parts[0]


def _profile_sums(profile: AttentionProfile) -> dict[str, Tensor]:
    """The profile of a whole prompt without what grows with it."""
    heavy = profile.column_mass.topk(min(HEAVY_COLUMNS, profile.column_mass.shape[1])).values
    return {"heavy_mass": heavy.sum(-1)} | {
        name: torch.as_tensor(getattr(profile, name)) for name in ADDITIVE
    }


def _sampled_figures(view: LayerView, season: Tensor, dominant: Tensor) -> dict[str, Tensor]:
    """Bounds, and persistence over seasons and as expected, on some rows of every head."""
    heads, steps, _ = view.model_queries.shape
    on_gpu = view.model_queries.is_cuda  # where vectors before RoPE are not at hand
    layer = Layer(
        view.model_queries,
        None if on_gpu else view.queries_before,
        view.model_keys,
        None if on_gpu else view.keys_before,
        *(view.rotary, view.attention.scale, view.query_start, view.key_start),
    )
    season = torch.where(season < steps, season, 0)  # on the CPU, as all that decides on shapes
    found = dict.fromkeys(BOUNDS, BoundCheck.none(heads, view.model_queries.device))
    found |= check_bounds(layer, season, dominant, SAMPLED_ROWS, SAMPLED_KEYS)
    figures = {
        name: torch.stack([getattr(found[bound], name) for bound in BOUNDS], 1)
        for name in ("checked", "violations", "tightness")
    }
    rows = spread_rows(steps - season.clamp_min(1), SAMPLED_ROWS)
    figures["expected"] = expected_persistence(view, rows, season).double()
    figures["observed"] = observed_seasons(view, rows, season).double()
    figures["sampled_rows"] = torch.tensor(rows.shape[1])
    figures["seasonal_rows"] = torch.where(season > 0, rows.shape[1], 0)
    return figures
