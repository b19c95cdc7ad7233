"""One model serves many callers at once: each gets what it gets alone, bit for bit."""

import asyncio
import random
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface

import tappa
from tappa.cache_argument import with_cache
from tappa.capture import prefill
from tappa.compression.cache import CompressedCache
from tappa.errors import CaptureError, CompressionError
from tappa.interface import AttentionSwitch, implementation_of
from tiny import tiny_model as make_tiny
from tiny import tiny_tokenizer

pytestmark = pytest.mark.same_kernel
tiny_model: Callable[..., Any] = make_tiny  # whose generate() type checkers do not see
IDS = torch.randint(3, 97, (1, 61), generator=torch.Generator().manual_seed(5))
OTHERS = torch.randint(3, 97, (2, 43), generator=torch.Generator().manual_seed(7))
MASK = torch.ones_like(OTHERS)
MASK[1, :11] = 0
NEW = 3
SMALL: dict[str, Any] = {"window": 7, "kernel": 3}
GREEDY: dict[str, Any] = {
    "max_new_tokens": NEW,
    "min_new_tokens": NEW,
    "do_sample": False,
    "return_dict_in_generate": True,
    "output_scores": True,
}
Answer = list[Tensor]


@pytest.fixture(autouse=True)
def _same_order_of_sums() -> Iterator[None]:
    """Kernels that split their work no way; threads that take turns often."""
    threads, interval = torch.get_num_threads(), sys.getswitchinterval()
    torch.set_num_threads(1)
    sys.setswitchinterval(1e-3)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        sys.setswitchinterval(interval)


@pytest.fixture
def model() -> Any:
    return tiny_model("llama")


def elsewhere(work: Callable[[], Any]) -> Any:
    """What a function gives in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


# ---- what callers ask for


def written(model: Any, ids: Tensor = IDS, **options: Any) -> Answer:
    """Tokens, and the logits of each."""
    out = model.generate(ids, **GREEDY, **options)
    return [out.sequences, *out.scores]


def plain(model: Any) -> Answer:
    return written(model)


def padded(model: Any) -> Answer:
    return written(model, OTHERS, attention_mask=MASK)


def inside_with(method: str, **options: Any) -> Callable[[Any], Answer]:
    def ask(model: Any) -> Answer:
        with tappa.compressed(model, method, None if method == "full" else 23, **options) as cache:
            return [*written(model), torch.tensor(cache.tokens_seen)]

    return ask


def own_cache(method: str, **options: Any) -> Callable[[Any], Answer]:
    def ask(model: Any) -> Answer:
        cache = tappa.compressed(model, method, 19, **options)
        return [*written(model, **with_cache(model, cache)), torch.tensor(cache.nbytes)]

    return ask


def fixed_steps(model: Any) -> Answer:
    cache = tappa.compressed(model, "snapkv", 23, **SMALL)
    return [tappa.generate(cache, IDS, NEW, graph=True)]


def analysis(model: Any) -> Answer:
    found = tappa.analyze(model, tiny_tokenizer(), "the cat sat on the mat and the dog sat too")
    frame = found.to_frame()
    return [torch.tensor(frame[name].to_numpy()) for name in ("q_similarity", "k_similarity")]


def captured(model: Any) -> Answer:
    seen: Answer = []
    logits = prefill(model, IDS, lambda view: seen.extend([view.queries_before, view.keys]))
    return [*seen, logits]


REQUESTS: dict[str, Callable[[Any], Answer]] = {
    "plain": plain,
    "padded": padded,
    "with full": inside_with("full"),
    "with tappa": inside_with("tappa", **SMALL),
    "with snapkv": inside_with("snapkv", **SMALL),
    "own streaming_llm": own_cache("streaming_llm", window=7, sinks=3),
    "own expected_attention": own_cache("expected_attention", window=7),
    "own cake": own_cache("cake", **SMALL),
    "fixed steps": fixed_steps,
    "analysis": analysis,
    "capture": captured,
}


def same(one: Answer, other: Answer) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def untouched(model: Any) -> bool:
    """No trace is left of all that has run."""
    hooks = [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]
    return (
        not hooks and model.config._attn_implementation == "sdpa" and "generate" not in vars(model)
    )


# ---- many at once


def asked_for(model: Any, context: Any) -> dict[str, Callable[[], Answer]]:
    made: dict[str, Callable[[], Answer]] = {
        name: partial(ask, model) for name, ask in REQUESTS.items()
    }
    longer = torch.cat([IDS, OTHERS[:1, :13]], 1)
    made["context"] = lambda: written(model, longer, **with_cache(model, context.cache()))
    return made


def wrong_of(asks: dict[str, Callable[[], Answer]], alone: dict[str, Answer], seed: int) -> list:
    names = random.Random(seed).choices(list(asks), k=20)
    return [name for name in names if not same(asks[name](), alone[name])]


def test_eight_threads_get_what_each_gets_alone() -> None:
    model, other = tiny_model("llama"), tiny_model("llama")
    context = tappa.compress_context(model, IDS, "snapkv", 23, **SMALL)
    asks = asked_for(model, context)
    alone_asks = asked_for(other, tappa.compress_context(other, IDS, "snapkv", 23, **SMALL))
    alone = {name: ask() for name, ask in alone_asks.items()}
    for name in ("with tappa", "own cake", "context"):  # what is mixed up would be seen
        assert not torch.equal(alone[name][2], alone["plain"][2])
    with ThreadPoolExecutor(8) as pool:
        assert [*pool.map(lambda seed: wrong_of(asks, alone, seed), range(8))] == [[]] * 8
    del context, asks
    assert untouched(model)


def test_asyncio_tasks_get_what_each_gets_alone(model: Any) -> None:
    context = tappa.compress_context(model, IDS, "snapkv", 23, **SMALL)
    asks = asked_for(model, context)
    alone = {name: ask() for name, ask in asks.items()}

    async def task(seed: int) -> list[str]:
        wrong = []
        for name in random.Random(seed).choices(list(asks), k=5):
            if not same(await asyncio.to_thread(asks[name]), alone[name]):
                wrong.append(name)
        return wrong

    async def all_tasks() -> list[list[str]]:
        return await asyncio.gather(*map(task, range(8)))

    assert asyncio.run(all_tasks()) == [[]] * 8


def test_a_with_belongs_to_the_task_that_entered_it(model: Any) -> None:
    expected = written(model)

    async def compressing(entered: asyncio.Event, leave: asyncio.Event) -> int:
        with tappa.compressed(model, "snapkv", 23, **SMALL) as cache:
            entered.set()
            await leave.wait()
            await asyncio.to_thread(written, model)
            return cache.tokens_seen

    async def both() -> int:
        entered, leave = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(compressing(entered, leave))
        await entered.wait()
        assert same(await asyncio.to_thread(written, model), expected)
        leave.set()
        return await task

    assert asyncio.run(both()) == 61 + NEW - 1


# ---- another thread at every moment


def at_every_moment(model: Any, work: Callable[[], Any]) -> Any:
    """Have `work` done in another thread whenever this one is to run a module of the last layer."""
    thread = threading.get_ident()

    def meanwhile(module: Any, args: tuple) -> None:
        if threading.get_ident() == thread:
            elsewhere(work)

    return [m.register_forward_pre_hook(meanwhile) for m in model.model.layers[-1].modules()]


@pytest.mark.parametrize("second", ["padded", "with tappa", "capture"])
@pytest.mark.parametrize(
    "first", ["with tappa", "own expected_attention", "fixed steps", "capture"]
)
def test_a_thread_within_the_pass_of_another(
    first: str, second: str, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The probe of RoPE and its random numbers included: this model has not run before."""
    monkeypatch.setattr(sys.modules[__name__], "NEW", 2)
    monkeypatch.setitem(GREEDY, "max_new_tokens", 2)
    monkeypatch.setitem(GREEDY, "min_new_tokens", 2)
    other = tiny_model("llama")
    expected = {name: REQUESTS[name](other) for name in (first, second)}
    beside: list[bool] = []
    handles = at_every_moment(
        model, lambda: beside.append(same(REQUESTS[second](model), expected[second]))
    )
    assert same(REQUESTS[first](model), expected[first])
    for handle in handles:
        handle.remove()
    assert len(beside) >= 12  # modules, more where RoPE is probed
    assert all(beside)
    assert untouched(model)


def test_a_copy_within_the_pass_of_the_cache_that_it_was_made_of(model: Any) -> None:
    """Each has a probe of RoPE of its own."""
    alone, cache = (
        tappa.compressed(one, "expected_attention", 19, window=7)
        for one in (tiny_model("llama"), model)
    )
    copies, beside = [cache.copy() for _ in range(97)], []

    def read(cache: Any) -> Tensor:
        with torch.inference_mode():
            first = cache.model(IDS, **with_cache(model, cache)).logits
            return torch.cat([first, cache.model(IDS[:, :1], **with_cache(model, cache)).logits], 1)

    expected = read(alone)
    handles = at_every_moment(
        model, lambda: beside.append(torch.equal(read(copies.pop()), expected))
    )
    assert torch.equal(read(cache), expected)
    for handle in handles:
        handle.remove()
    assert len(beside) >= 12
    assert all(beside)


def test_plain_text_beside_a_with_is_that_of_the_model_alone(model: Any) -> None:
    class Streamer:
        calls = 0

        def put(self, value: Tensor) -> None:
            self.calls += 1
            if self.calls == 2:
                others.append(elsewhere(lambda: written(model, OTHERS, attention_mask=MASK)))

        def end(self) -> None:
            pass

    others: list[Answer] = []
    expected = padded(model)
    alone = inside_with("snapkv", **SMALL)(model)
    with tappa.compressed(model, "snapkv", 23, **SMALL) as cache:
        beside = [*written(model, streamer=Streamer()), torch.tensor(cache.tokens_seen)]
    assert same(beside, alone)
    assert same(others[0], expected)


# ---- one cache, two threads


def test_a_cache_in_use_is_refused_to_another_thread(model: Any) -> None:
    cache = tappa.compressed(model, "snapkv", 23, **SMALL)
    given = with_cache(model, cache)
    told: list[str] = []

    def try_it(use: Callable[[], Any]) -> None:
        with pytest.raises(CompressionError) as error:
            use()
        told.append(str(error.value))

    def meanwhile(module: Any, args: tuple) -> None:
        if threading.get_ident() == thread:
            elsewhere(lambda: try_it(lambda: model(OTHERS[:1], **given)))
            elsewhere(lambda: try_it(lambda: tappa.generate(cache, IDS, NEW)))
            elsewhere(lambda: try_it(cache.reset))
            elsewhere(lambda: try_it(cache.copy))

    thread = threading.get_ident()
    handle = model.lm_head.register_forward_pre_hook(meanwhile)
    with torch.inference_mode():
        first = model(IDS, **given).logits
        alone = tappa.compressed(model, "snapkv", 23, **SMALL)
    handle.remove()
    use = "this cache is in use by another thread: give each thread a cache of its own"
    assert told == [use] * 4
    with torch.inference_mode():
        assert torch.equal(first, model(IDS, **with_cache(model, alone)).logits)
    assert elsewhere(lambda: model(OTHERS[:1, :1], **given)).logits.isfinite().all()  # handed on


def test_one_with_does_not_write_two_texts_at_once(model: Any) -> None:
    both_in = threading.Barrier(2, timeout=20)

    class Waiting:
        """The first writes on once the second has been refused."""

        def put(self, value: Tensor) -> None:
            if not done:
                done.append(None)
                both_in.wait()
                both_in.wait()

        def end(self) -> None:
            pass

    done: list[None] = []
    expected = inside_with("snapkv", **SMALL)(tiny_model("llama"))

    async def both() -> Answer:
        with tappa.compressed(model, "snapkv", 23, **SMALL):
            first = asyncio.create_task(asyncio.to_thread(written, model, streamer=Waiting()))
            await asyncio.to_thread(both_in.wait)
            with pytest.raises(CompressionError, match="in use by another thread"):
                await asyncio.to_thread(written, model)
            await asyncio.to_thread(both_in.wait)
            return await first

    assert same(asyncio.run(both()), expected[:-1])


# ---- what is left after a pass


def test_an_interrupted_pass_does_no_harm(model: Any) -> None:
    """Torch calls no hook after KeyboardInterrupt."""
    expected = written(model)
    cache = tappa.compressed(model, "snapkv", 23, **SMALL)

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    handle = model.lm_head.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        written(model, **with_cache(model, cache))
    handle.remove()
    assert same(elsewhere(lambda: written(model)), expected)
    assert same(written(model), expected)
    with pytest.raises(CompressionError, match=r"failed: call reset\(\) first"):
        model(IDS, **with_cache(model, cache))
    cache.reset()
    assert elsewhere(lambda: model(IDS, **with_cache(model, cache))).logits.isfinite().all()
    del cache
    assert untouched(model)


def test_a_switch_is_on_in_one_thread_only(model: Any) -> None:
    def nothing(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("called for another thread")

    first, second = (AttentionSwitch(model, nothing) for _ in range(2))
    first.on()
    with pytest.raises(CaptureError, match="already being captured or compressed"):
        second.on()
    assert implementation_of(model.config) == first.wrapped == "sdpa"
    expected = written(tiny_model("llama"))
    assert same(elsewhere(lambda: written(model)), expected)

    def on_and_off() -> str:
        second.on()
        first.off()  # not this thread's
        second.off()
        return model.config._attn_implementation

    assert elsewhere(on_and_off) == "tappa_sdpa"
    first.off()
    first.off()
    assert untouched(model)


def test_flash_attention_finds_its_own_name(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It loads the kernel that the config of the module names."""
    told = []

    def spy(module: Any, *args: Any, **kwargs: Any) -> Any:
        told.append(module.config._attn_implementation)
        return AttentionInterface()["sdpa"](module, *args, **kwargs)

    AttentionInterface.register("flash_spy", spy)
    try:
        monkeypatch.setattr(model.config, "_attn_implementation_internal", "flash_spy")
        prefill(model, IDS, lambda view: None)
    finally:
        for name in ("flash_spy", "tappa_flash_spy"):
            AttentionInterface._global_mapping.pop(name, None)
    assert len(told) == 2
    assert set(told) == {"flash_spy"}


def test_hooks_that_torch_calls_half_way_do_nothing(model: Any) -> None:
    """Without `kwargs`, as while another thread puts them in."""
    cache: Any = tappa.compressed(model, "full")
    assert isinstance(cache, CompressedCache)
    assert cache._before(model, (IDS,)) is None
    cache._after(model, (IDS,), object())
    assert cache.tokens_seen == 0
