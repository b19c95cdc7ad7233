"""Steps through a cache one by one, or on fixed buffers with tokens dropped in between."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tappa.cache_argument import with_cache
from tappa.compression.cache import CompressedCache
from tappa.compression.decoder import Decoder, FixedReader
from tappa.compression.eviction import Evictor, sums_of_ranks
from tappa.compression.fixed import Counts, FixedKV
from tappa.compression.rereading import crosses_border

PERIOD = 16  # steps at most between two looks at what was written


class PlainSteps:
    """Every step is a call of the model, which looks after its cache."""

    def __init__(
        self,
        cache: CompressedCache,
        decoder: Decoder,
        mask: Int[Tensor, "rows tokens"],
        text: Int[Tensor, "rows written"],
    ) -> None:
        """`text` is what the decoder writes on, `mask` that of the prompts."""
        self.cache, self.decoder, self.mask, self.text = cache, decoder, mask, text
        if mask.shape[1] == cache.tokens_seen:  # the first new token is known
            self._grow()

    def room(self) -> int:
        """One at a time, so that none is one too many."""
        return 1

    def run(self, steps: int) -> None:
        """So many steps."""
        for _ in range(steps):
            self.decoder.step(self._read)
            self._grow()

    def finish(self, too_many: int) -> None:
        """Nothing to do."""
        assert too_many == 0

    def _read(
        self, tokens: Int[Tensor, "rows 1"], position_ids: Int[Tensor, "rows 1"]
    ) -> Float[Tensor, "rows vocabulary"]:
        """Where the model reads all of a text again, so is done here."""
        seen = self.cache.tokens_seen
        if not self.cache.frozen and crosses_border(self.cache.model, seen, seen + 1):
            written = self.decoder.written[:, : int(self.decoder.count)]
            tokens = torch.cat([self.text, written], 1)
            position_ids = (self.mask.cumsum(1) - 1).clamp_min(0)
            self.cache.reset()
        output = self.cache.model(
            tokens,
            attention_mask=self.mask,
            position_ids=position_ids,
            logits_to_keep=1,
            **with_cache(self.cache.model, self.cache),
        )
        return output.logits[:, -1].to(tokens.device)  # from where the last layer lies

    def _grow(self) -> None:
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], 1)


class FixedSteps:
    """Steps on a FixedKV; the cache gets its tokens back at the end."""

    def __init__(
        self, cache: CompressedCache, decoder: Decoder, new: int, compiled: bool = False
    ) -> None:
        self.cache, self.decoder, self.new, self.compiled = cache, decoder, new, compiled
        self.dropped_at = 0  # tokens seen when some were last dropped here
        self._start()

    def room(self) -> int:
        """Steps that can be run now, after some tokens are dropped if need be."""
        if self.evictor is None:
            return PERIOD
        if self.evictor.steps_left < 1:
            self.dropped_at = self.fixed.seen
            if not self.evictor.make_room():  # a layer wants to hold more than its region does
                self._give_back(0)
                self._start()
        left = max(self.evictor.steps_left, 1)  # one, where no more can be dropped
        return min(PERIOD, left, self.fixed.room)

    def run(self, steps: int) -> None:
        """So many steps, for which there must be room."""
        self.decoder.run(self.reader, steps)
        self.fixed.seen += steps
        self.new -= steps
        if self.evictor is not None:
            self.evictor.counts += steps

    def finish(self, too_many: int) -> None:
        """Give the tokens back, all but those of the last steps if they were too many."""
        self._give_back(too_many)

    def _start(self) -> None:
        """Take the tokens over, and record a step."""
        cache = self.cache
        if cache.evicting:
            cache.make_room(1)
        layers = cache.compressed_layers
        held = [layer.storage() for layer in layers]
        lengths = torch.tensor([one.lengths for one in held])
        lengths = lengths.view(len(held), held[0].rows, held[0].kv_heads)
        room, mine = self.new, None
        if cache.evicting:
            counts = cache.shards.gather(lengths, 2)
            room, capacity = self._room_and_capacity(counts)
            # of what heads share on all ranks, this one holds no more than its own tokens
            mine = torch.minimum(
                cache.shards.mine(capacity, 2)[..., 0], (lengths + self.new).sum(2)
            )
        self.fixed = FixedKV(lengths, room, held[0], cache.tokens_seen, mine)
        for number, one in enumerate(held):
            self.fixed.fill(number, one)
        at_once = cache.nbytes + self.fixed.buffer_nbytes
        cache.peak_nbytes = max(cache.peak_nbytes, at_once)
        self.evictor = None
        if cache.evicting:
            self.evictor = Evictor(cache, self.fixed, counts, capacity)
        if cache.evicting and "window" in cache.method.scorer.needs:
            self.fixed.remember(
                [torch.cat([o.window for o in layer.observations]) for layer in layers]
            )
        self.reader = FixedReader(cache.model, self.fixed, cache.switch, self.compiled)
        if self.fixed.keys.is_cuda:
            self.decoder.capture(self.reader)

    def _room_and_capacity(self, lengths: Counts) -> tuple[int, Int[Tensor, "layers rows ranks"]]:
        """Steps between two cuts at most, and what a region may come to hold at once.

        A layer that holds less than it would like, since its prompt has no more, grows later on.
        """
        cache, layers, kv_heads = self.cache, len(lengths), lengths.shape[2]
        room, capacity = 0, []
        for row in range(lengths.shape[1]):
            held, total = lengths[:, row], cache.total(row)
            room = max(room, (total - int(held.sum())) // (layers * kv_heads))
            later = held + self.new
            if cache.method.sharing == "pooled":
                later = later.sum(1, keepdim=True)
            capacity.append(torch.tensor(cache.divide(row, later.tolist(), total)))
        if cache.method.sharing == "pooled":
            lengths = lengths.sum(2, keepdim=True)
        most = torch.maximum(
            *(sums_of_ranks(x, cache.shards.ranks) for x in (torch.stack(capacity, 1), lengths))
        )
        return min(self.new, max(room, cache.every)), most

    def _give_back(self, too_many: int) -> None:
        """The cache holds what it would hold, had it gone through the steps itself."""
        fixed, cache = self.fixed, self.cache
        fixed.lengths -= too_many
        fixed.seen -= too_many
        for number, layer in enumerate(cache.compressed_layers):
            layer.take(fixed.taken(number), fixed.seen)
            layer.dropped_at = max(layer.dropped_at, self.dropped_at)
            if fixed.recent is None:
                continue
            # the last steps have written over as many of the oldest queries
            queries = fixed.last_queries(number)[:, too_many:]
            parts = queries.split(len(queries) // fixed.rows)
            for seen, window in zip(layer.observations, parts, strict=True):
                seen.restart(window, fixed.seen)
        cache.peak_nbytes = max(cache.peak_nbytes, cache.nbytes)
