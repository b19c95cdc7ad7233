"""Write on from a compressed cache: `generate`, which decides how steps are run."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedModel

from tappa.arguments import check_callable, finite_number, whole_number
from tappa.cache_argument import with_cache
from tappa.compression.cache import CompressedCache
from tappa.compression.decoder import Decoder, choose_tokens
from tappa.compression.eviction import NEEDS
from tappa.compression.generation import CompressedContext
from tappa.compression.greedy import kept
from tappa.compression.options import check_ids, check_padding
from tappa.compression.rereading import crosses_border
from tappa.compression.stepping import PERIOD, FixedSteps, PlainSteps
from tappa.errors import CompressionError, NonFiniteError

Ids = Int[Tensor, "rows tokens"]


def generate(
    cache: CompressedCache,
    input_ids: Ids,
    max_new_tokens: int,
    *,
    attention_mask: Ids | None = None,
    temperature: float = 0.0,
    graph: bool | None = None,
    compiled: bool = False,
    show: Callable[[Ids], None] | None = None,
    stop: Callable[[Ids], Bool[Tensor, " rows"]] | None = None,
) -> Int[Tensor, "rows written"]:
    """Prompts and what follows, as `model.generate` gives them where it has no logits processors.

        ids = generate(tappa.compressed(model, "tappa", 1024), prompt_ids, 200)

    The cache may have read the prompts already, all but one token at least. `temperature` 0 takes
    the most probable token, else tokens are drawn. A row ends with the `eos_token_id` of the
    model's generation config, or where `stop`, a function of all ids (rows, tokens) that is called
    every few steps, returns True for it. `show` is given the new tokens every few steps.

    With `graph` True, steps run on buffers of a fixed size, as a CUDA graph where there is a GPU;
    CompressionError tells why where that cannot be. With False they run one by one through the
    cache. By default a GPU gets the graph where it can, and where it pays: from 17 tokens on.
    `compiled` has torch.compile fuse the small operations of a step: faster, after a minute or so
    at the first prompt.

    Raises CompressionError for what cannot be written on, NonFiniteError for NaN among the logits.
    """
    _check(cache, input_ids, attention_mask, max_new_tokens, temperature)
    check_callable("show", show)
    check_callable("stop", stop)
    device = next(cache.model.parameters()).device
    if compiled and device.type != "cuda" and not graph:
        raise CompressionError("compiled steps need a GPU")
    ids = input_ids.to(device)
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask.to(device)
    with cache.claim, torch.inference_mode():
        first = _read(cache, ids, mask, temperature)
        known = [] if first is None else [first[:, None]]
        if show and known:
            show(known[0])
        last, after = (ids[:, -1], mask.sum(1) - 1) if first is None else (first, mask.sum(1))
        new = max_new_tokens - len(known)
        decoder = Decoder(last, after, new, temperature, *_ends(cache), cache.shards)
        if first is None:
            decoder.finished.fill_(False)  # whatever a prompt ends with
        text = torch.cat([ids, *known], 1)
        steps = _choose_steps(cache, decoder, mask, text, new, graph, compiled)
        run = done = 0
        while run < new and not bool(decoder.finished.all()):
            size = min(new - run, steps.room())
            steps.run(size)
            run += size
            done = run - _after_the_end(decoder, run)
            if show:
                show(decoder.written[:, run - size : done])
            if stop:
                decoder.finished |= stop(torch.cat([ids, *known, decoder.written[:, :done]], 1))
        steps.finish(run - done)
        output = torch.cat([ids, *known, decoder.written[:, :done]], 1)
        start = cache.history.length  # steps of a graph do not tell the cache
        if start < cache.tokens_seen:
            cache.history.note(output[:, start : cache.tokens_seen], start)
        return output


def _check(
    cache: CompressedCache, ids: Ids, mask: Ids | None, new: int, temperature: float
) -> None:
    """Refuse what would fail later, or write something else. Raises CompressionError."""
    if not isinstance(cache, CompressedCache):
        kind = type(cache).__name__
        hint = ": its .cache() makes one" if isinstance(cache, CompressedContext) else ""
        raise CompressionError(f"expected a cache of tappa.compressed, got a {kind}{hint}")
    check_ids(ids, cache.model)
    whole_number("max_new_tokens", new, 1, CompressionError)
    finite_number("temperature", temperature, CompressionError)
    check_padding(mask, ids)
    if mask is not None and bool((mask[:, 1:] < mask[:, :-1]).any()):
        raise CompressionError("expected prompts padded on the left, with no padding after a token")


def takes_over(model: PreTrainedModel, graph: bool | None = None) -> bool:
    """Whether `generate` is to write greedy text in the place of `model.generate`.

    So it is on a GPU, where it is faster, or if `graph` asks for it. A generation config that wants
    another than the most probable token (a repetition penalty) is for `model.generate`; with
    `graph` True it raises CompressionError.
    """
    more = kept(model)
    if graph and more:
        raise CompressionError(
            f"cannot decode in fixed steps: the model's generation config asks for {more[0]}"
        )
    by_default = next(model.parameters()).device.type == "cuda" and not more
    return by_default if graph is None else graph


def _choose_steps(
    cache: CompressedCache,
    decoder: Decoder,
    mask: Ids,
    text: Int[Tensor, "rows written"],
    new: int,
    graph: bool | None,
    compiled: bool,
) -> FixedSteps | PlainSteps:
    """What `graph` asks for; by default what is faster and fits into memory."""
    reason = why_not(cache)
    if crosses_border(cache.model, cache.tokens_seen, cache.tokens_seen + new):
        reason = "the model reads all tokens again when its text has grown so long"
    if graph and reason:
        raise CompressionError(f"cannot decode in fixed steps: {reason}")
    recordable = getattr(cache.model, "_can_compile_fullgraph", False)  # as transformers knows
    pays = graph is None and decoder.tokens.is_cuda and recordable and new > PERIOD and not reason
    over = new < 1 or bool(decoder.finished.all())
    if (graph or pays) and not over:
        try:
            return FixedSteps(cache, decoder, new, compiled)
        except torch.OutOfMemoryError:  # its buffers are beside the cache
            if graph or cache.shards.ranks > 1:  # other ranks may have the memory
                raise
    return PlainSteps(cache, decoder, mask, text)


def why_not(cache: CompressedCache) -> str | None:
    """Why a cache that has read something cannot be decoded in fixed steps; None if it can."""
    layers, method = cache.compressed_layers, cache.method
    if len({weight.device for weight in cache.model.parameters()}) > 1:
        return "the model lies on several devices"
    if any(not layer.plain for layer in layers):
        return "its layers share or expand what they cache"
    if len(layers) < len(cache.layers):
        return "some layers have a sliding window"
    if len({(layer.kv_heads, *layer.storage().sizes) for layer in layers}) > 1:
        return "its layers differ in their KV heads"
    if any(layer.attention != layers[0].attention for layer in layers):
        return "its layers attend in different ways"
    if not cache.evicting:
        return None
    if method.scorer.needs - NEEDS:
        return f"{method.name} scores tokens by {', '.join(sorted(method.scorer.needs - NEEDS))}"
    if "window" in method.scorer.needs:
        last = list(range(cache.tokens_seen - method.window, cache.tokens_seen))
        rows = [seen for layer in layers for seen in layer.observations]
        if any(seen.window_positions.tolist() != last for seen in rows):
            return "a prompt is shorter than the window, or has padding inside"
    return None


def _read(cache: CompressedCache, ids: Ids, mask: Ids, temperature: float) -> Tensor | None:
    """Read what the cache lacks of the prompts: the first new tokens, or None if that is one."""
    seen = cache.tokens_seen
    cache.history.check(ids)
    if ids.shape[1] <= seen:
        raise CompressionError(
            f"expected prompts of more than the {seen} tokens that the cache has seen, "
            f"got {ids.shape[1]}: call reset() before another prompt"
        )
    if seen and ids.shape[1] == seen + 1:
        return None
    positions = (mask.cumsum(1) - 1).clamp_min(0)[:, seen:]
    logits = cache.model(
        ids[:, seen:],
        attention_mask=mask,
        position_ids=positions,
        **with_cache(cache.model, cache),
        logits_to_keep=1,
    ).logits
    if bool(logits[:, -1].isnan().any()):
        raise NonFiniteError("NaN among the logits of the first new token: look at the weights")
    last = logits[:, -1].to(ids.device)  # from where the last layer lies
    return choose_tokens(last, temperature, cache.shards)


def _ends(cache: CompressedCache) -> tuple[list[int], int]:
    """Tokens that end a row, and the one that is written from then on."""
    config = cache.model.generation_config
    ends = [] if config is None or config.eos_token_id is None else config.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends)
    pad = None if config is None else config.pad_token_id
    return ends, pad if pad is not None else (ends or [0])[0]


def _after_the_end(decoder: Decoder, run: int) -> int:
    """Of so many steps, those at the end that came after all rows had ended."""
    if not bool(decoder.finished.all()):
        return 0
    ended = torch.isin(decoder.written[:, :run], decoder.ends)
    first = torch.where(ended.any(1), ended.int().argmax(1) + 1, 0)  # 0: ended before, or by `stop`
    return run - int(first.max()) if bool(ended.any()) else 0
