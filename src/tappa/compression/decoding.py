"""Write on from a compressed cache: `generate`, which decides how steps are run."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tappa.compression.cache import CompressedCache
from tappa.compression.decoder import Decoder, choose_tokens
from tappa.compression.eviction import NEEDS
from tappa.compression.stepping import FixedSteps, PlainSteps
from tappa.errors import CompressionError

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
    model's generation config, or where `stop`, which sees all ids every few steps, says so. `show`
    is given the new tokens every few steps.

    With `graph` True, steps run on buffers of a fixed size, as a CUDA graph where there is a GPU;
    CompressionError tells why where that cannot be. With False they run one by one through the
    cache. By default a GPU gets the graph where it can. `compiled` has torch.compile fuse the small
    operations of a step: faster, after a minute or so at the first prompt.
    """
    model = cache.model
    device = next(model.parameters()).device
    ids = input_ids.to(device)
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask.to(device)
    with torch.inference_mode():
        first = _read(cache, ids, mask, temperature)
        reason = why_not(cache)
        if graph and reason:
            raise CompressionError(f"cannot decode in fixed steps: {reason}")
        known = [] if first is None else [first[:, None]]
        last, after = (ids[:, -1], mask.sum(1) - 1) if first is None else (first, mask.sum(1))
        new = max_new_tokens - len(known)
        decoder = Decoder(last, after, new, temperature, *_ends(cache))
        if first is None:
            decoder.finished.fill_(False)  # whatever a prompt ends with
        fixed = graph or (graph is None and device.type == "cuda" and reason is None)
        steps: FixedSteps | PlainSteps = PlainSteps(cache, decoder, mask)
        if fixed:
            steps = FixedSteps(cache, decoder, new, compiled)
        if show and known:
            show(known[0])
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
        return torch.cat([ids, *known, decoder.written[:, :done]], 1)


def why_not(cache: CompressedCache) -> str | None:
    """Why a cache that has read something cannot be decoded in fixed steps; None if it can."""
    layers, method = cache.compressed_layers, cache.method
    if len(layers) < len(cache.layers):
        return "some layers have a sliding window"
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
        past_key_values=cache,
        logits_to_keep=1,
    ).logits
    return choose_tokens(logits[:, -1], temperature)


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
