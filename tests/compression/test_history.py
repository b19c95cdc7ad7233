"""A cache goes on with the text that it has seen, and with no other."""

import copy
from typing import Any

import pytest
import torch

import tappa
from tappa.cache_argument import with_cache
from tappa.compression import stack_caches
from tappa.compression.history import UNKNOWN, History
from tappa.errors import CompressionError
from tiny import tiny_model as make_tiny

tiny_model: Any = make_tiny
IDS = torch.arange(3, 34)[None]  # 31 tokens
OTHER = IDS.clone()
OTHER[0, 11] = 97
NEW = torch.tensor([[53, 59, 61]])
SAYS = "got id 97 in the place of 14 at position 11: call reset()"


def write(cache: Any, ids: torch.Tensor, new: int = 2, **more: Any) -> torch.Tensor:
    options = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0} | more
    mask = torch.ones_like(ids)
    given = with_cache(cache.model, cache)
    return cache.model.generate(ids, attention_mask=mask, **given, **options)


def made(model: Any) -> Any:
    return tappa.compressed(model, "streaming_llm", 13, window=7, sinks=2)


def longer(ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([ids, NEW.expand(len(ids), -1)], 1)


@pytest.mark.parametrize("graph", [None, False, True])
def test_another_text_is_refused(graph: bool | None) -> None:
    """By `model.generate` (None), and by `tappa.generate` in plain and in fixed steps."""
    cache = made(tiny_model("llama"))

    def go_on(ids: torch.Tensor) -> torch.Tensor:
        return write(cache, ids) if graph is None else tappa.generate(cache, ids, 2, graph=graph)

    text = go_on(IDS)
    seen = cache.tokens_seen
    with pytest.raises(CompressionError, match=SAYS):
        go_on(longer(torch.cat([OTHER, text[:, 31:]], 1)))
    changed = text.clone()
    changed[0, 31] = (text[0, 31] + 1) % 101  # what was written counts
    with pytest.raises(CompressionError, match="at position 31: call reset"):
        go_on(longer(changed))
    assert cache.tokens_seen == seen
    more = go_on(longer(text))
    assert more[:, :36].tolist() == longer(text).tolist()
    cache.reset()
    assert go_on(OTHER)[:, :31].tolist() == OTHER.tolist()


def test_a_cache_tells_which_texts_go_on_with_it() -> None:
    cache = made(tiny_model("llama"))
    assert cache.continues(IDS)
    text = write(cache, IDS)  # 33 tokens, of which the last one is not seen
    assert cache.continues(text)
    assert cache.continues(longer(text))
    assert not cache.continues(text[:, :32])
    assert not cache.continues(longer(OTHER))
    assert not cache.continues(longer(text).expand(2, -1))
    with pytest.raises(CompressionError, match=r"new tokens after the 32 .* got none: call reset"):
        cache.model(IDS[:, :0], **with_cache(cache.model, cache))
    cache.reset()
    assert cache.continues(OTHER)


def test_each_row_is_compared() -> None:
    cache = made(tiny_model("llama"))
    rows = torch.cat([IDS, IDS.flip(1)])
    text = write(cache, rows)
    changed = text.clone()
    changed[1, 5] = 97
    with pytest.raises(CompressionError, match="place of 28 at position 5 of row 1"):
        write(cache, longer(changed))


def test_contexts_and_caches_of_recordings() -> None:
    model = tiny_model("llama")
    context = tappa.compress_context(model, IDS, "streaming_llm", 13, window=7, sinks=2, chunk=8)
    recorded = tappa.record(model, IDS).compress("streaming_llm", [13], window=7, sinks=2)[0]
    for cache in (context.cache(), recorded):
        with pytest.raises(CompressionError, match=SAYS):
            write(cache, longer(OTHER))
        assert write(cache, longer(IDS))[:, :34].tolist() == longer(IDS).tolist()


def test_inside_with_another_text_is_another_prompt() -> None:
    model = tiny_model("llama")
    with made(model) as cache:
        options = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
        model.generate(IDS, **options)
        model.generate(longer(OTHER), **options)
        assert cache.tokens_seen == 35
        with pytest.raises(CompressionError, match="got id 14 in the place of 97 at position 11"):
            write(cache, longer(longer(IDS)))


def test_what_was_cropped_or_padded_or_embedded_is_not_compared() -> None:
    model = tiny_model("llama")
    cache = tappa.compressed(model, "full")
    write(cache, IDS)
    cache.crop(-(cache.tokens_seen - 11))
    assert write(cache, OTHER)[:, :31].tolist() == OTHER.tolist()
    cache.reset()
    given = with_cache(model, cache)
    padded, mask = IDS.clone(), torch.ones_like(IDS)
    padded[0, :3], mask[0, :3] = 0, 0
    model(padded, attention_mask=mask, **given)
    cache.history.check(torch.cat([NEW, IDS[:, 3:], NEW], 1))
    cache.reset()
    model(inputs_embeds=model.get_input_embeddings()(IDS), **given)
    model(NEW, **given)
    cache.history.check(longer(OTHER))
    with pytest.raises(CompressionError, match="place of 53 at position 31"):
        cache.history.check(torch.cat([OTHER, NEW.flip(1)], 1))


def test_rows_are_chosen_and_repeated() -> None:
    cache = tappa.compressed(model := tiny_model("llama"), "full")
    rows = torch.cat([IDS, OTHER])
    model(rows, **with_cache(model, cache))
    cache.batch_repeat_interleave(2)
    cache.history.check(rows.repeat_interleave(2, 0))
    cache.reorder_cache(torch.tensor([3, 0, 0, 1]))
    cache.history.check(torch.cat([OTHER, IDS, IDS, IDS]))
    cache.batch_select_indices(torch.tensor([True, False, True, False]))
    cache.history.check(torch.cat([OTHER, IDS]))
    with pytest.raises(CompressionError, match="at position 11 of row 0"):
        cache.history.check(torch.cat([IDS, IDS]))
    stack_caches([cache, cache]).history.check(torch.cat([IDS] * 4))  # nothing is known of it


def test_many_pieces_are_put_together() -> None:
    history = History()
    for number in range(601):
        history.note(torch.tensor([[number % 101]]), number)
    assert history.length == 601
    assert len(history._pieces) < 300
    history.check(torch.arange(601)[None] % 101)
    history.note(torch.tensor([[7, 11]]), 603)  # two were seen elsewhere
    text = torch.cat([torch.arange(601) % 101, torch.tensor([1, 2, 7, 11])])[None]
    history.check(text)
    assert history._whole()[0, 600:].tolist() == [95, UNKNOWN, UNKNOWN, 7, 11]


def test_a_buffer_that_is_written_again_is_remembered_as_it_was() -> None:
    history, buffer = History(), torch.tensor([[5, 7]])
    history.note(buffer, 0)
    buffer.fill_(3)
    history.check(torch.tensor([[5, 7, 9]]))


def test_the_model_is_as_before_once_its_caches_are_gone() -> None:
    model = tiny_model("llama")
    first, second = made(model), made(model)
    assert "prepare_inputs_for_generation" in vars(model)
    twin = copy.deepcopy(model)
    assert twin.prepare_inputs_for_generation.__self__ is twin
    del first
    assert "prepare_inputs_for_generation" in vars(model)
    del second
    assert "prepare_inputs_for_generation" not in vars(model)
