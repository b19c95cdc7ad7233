"""lm-evaluation-harness with a compressed KV cache: the model type `tappa`.

Every prompt is read up to its last token, compressed, and then answered: the last token of the
prompt and all that follows sees only what the cache still holds. lm-eval does the rest.
"""

import inspect
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import lm_eval.models  # noqa: F401  (first: the registry of lm-eval's own models)
import torch
from jaxtyping import Bool, Float, Int
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import tappa
from tappa.cache_argument import with_cache
from tappa.compression import CompressedCache, check_method, generate, parse_budget, takes_over
from tappa.compression.greedy import greedy_arguments, warn_of_left_out
from tappa.errors import EvaluationError, TextError
from tappa.evaluation.memory import free_memory, is_out_of_memory
from tappa.texts import require_unicode, template_errors

Pair = tuple[tuple[str, str] | None, list[int], list[int]]  # the strings; context, continuation
DEVICE_OF_LM_EVAL = "cuda:0"  # what its command line hands over where no device is asked for
log = logging.getLogger(__name__)
_OF_HFLM = set(inspect.signature(HFLM.__init__).parameters) - {"self", "kwargs", "pretrained"}


@register_model("tappa")
class TappaLM(HFLM):
    """lm-eval's HFLM whose answers come out of a compressed cache, a fresh one for each batch.

        tappa lm-eval --model tappa --model_args pretrained=M,method=tappa,budget=512 --tasks ...
        lm_eval.simple_evaluate(model=TappaLM(model, tokenizer=tokenizer, budget=512), tasks=[...])

    `pretrained` is what `tappa.load` takes, or a model in memory with its `tokenizer`. `budget` is
    in tokens per layer and KV head, or a share of the prompt; with `evict` it is also kept while
    answering, by default the answer comes on top, as in the papers of the methods. Arguments that
    neither tappa nor HFLM knows are options of the method.

    A log-likelihood is that of a continuation after the compressed context. A context of one token
    (as in rolling log-likelihoods) has nothing to compress.
    """

    halves = True  # a batch that does not fit into memory

    def __init__(
        self,
        pretrained: str | PreTrainedModel | None = None,
        method: str = "tappa",
        budget: int | float | str = 512,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        analysis: str | Path | None = None,
        evict: bool = False,
        every: int = 16,
        device: str | None = None,
        dtype: str = "auto",
        trust_remote_code: bool = False,
        **others: Any,
    ) -> None:
        size = parse_budget(budget) if isinstance(budget, str) else budget
        of_method = {name: value for name, value in others.items() if name not in _OF_HFLM}
        check_method(method, size, **of_method)  # before anything is loaded
        if isinstance(pretrained, str) or pretrained is None:
            pretrained, tokenizer = tappa.load(
                pretrained,
                device=_device(device),
                dtype=dtype,
                trust_remote_code=bool(trust_remote_code),
            )
        elif tokenizer is None:
            raise EvaluationError("expected a tokenizer with a model in memory")
        of_hflm = {name: value for name, value in others.items() if name in _OF_HFLM}
        of_hflms = logging.getLogger("lm_eval.models.huggingface")
        level = of_hflms.level
        of_hflms.setLevel(logging.ERROR)  # it warns of models in memory
        try:
            super().__init__(pretrained=pretrained, tokenizer=cast(Any, tokenizer), **of_hflm)
        finally:
            of_hflms.setLevel(level)
        self.method, self.budget, self.evict = method, size, evict
        self.most_rows: int | None = None  # of a batch that fits into memory
        self.graph: bool | None = None  # as in `generate`: on a GPU where it can be
        self.options = {"analysis": analysis, "every": every} | of_method
        warn_of_left_out(cast(PreTrainedModel, self.model))
        self.new_cache()  # what cannot work is refused now, not after the first prompt

    def new_cache(self) -> CompressedCache:
        """A cache for one batch."""
        return tappa.compressed(
            cast(PreTrainedModel, self.model), self.method, self.budget, **self.options
        )

    def cache_of(
        self, ids: Int[Tensor, "rows tokens"], mask: Int[Tensor, "rows tokens"]
    ) -> CompressedCache:
        """A cache that has read prompts, all but their last tokens."""
        cache = self.new_cache()
        read(cache, ids, mask)
        return cache

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
        """Called by lm-eval: the tokens of a text."""
        require_unicode(string, "a text of the task")
        return super().tok_encode(string, *args, **kwargs)

    def tok_batch_encode(
        self, strings: Sequence[str], *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by lm-eval: the tokens of prompts, padded."""
        for text in strings:
            require_unicode(text, "a text of the task")
        return super().tok_batch_encode(list(strings), *args, **kwargs)

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> str:
        """Called by lm-eval: turns in the tokenizer's chat template."""
        if not self.tokenizer.chat_template:
            raise TextError("expected a tokenizer with a chat template, this one has none")
        with template_errors():
            return super().apply_chat_template(*args, **kwargs)

    def _model_generate(
        self,
        context: Int[Tensor, "rows tokens"],
        max_length: int,
        stop: list[str],
        attention_mask: Int[Tensor, "rows tokens"] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Called by lm-eval with a batch of prompts, padded on the left.

        Where memory does not suffice the batch is halved, and so are those that follow.
        """
        mask = torch.ones_like(context) if attention_mask is None else attention_mask
        rows = len(context)
        if self.most_rows is None or rows <= self.most_rows:
            try:
                return self._generate_rows(context, mask, max_length, stop, kwargs)
            except (RuntimeError, MemoryError) as error:
                if not (self.halves and rows > 1 and is_out_of_memory(error)):
                    raise
            self.most_rows = rows // 2
            free_memory()
            log.warning(f"out of memory with a batch of {rows}: going on with {self.most_rows}")
        parts = [
            self._model_generate(some, max_length, stop, of_some, **kwargs)
            for some, of_some in zip(
                context.split(self.most_rows), mask.split(self.most_rows), strict=True
            )
        ]
        return self._as_one(parts)

    def _as_one(self, parts: Sequence[Int[Tensor, "_ _"]]) -> Int[Tensor, "rows longest"]:
        """Batches of answers as one; those that ended earlier are padded on the right."""
        longest, pad = max(part.shape[1] for part in parts), self.tokenizer.pad_token_id
        padded = [
            torch.nn.functional.pad(part, (0, longest - part.shape[1]), value=pad) for part in parts
        ]
        return torch.cat(padded)

    def _generate_rows(
        self,
        context: Int[Tensor, "rows tokens"],
        mask: Int[Tensor, "rows tokens"],
        max_length: int,
        stop: list[str],
        kwargs: dict[str, Any],
    ) -> Tensor:
        cache = self.cache_of(context, mask)
        cache.frozen = not self.evict
        if self._greedy(kwargs) and takes_over(cache.model, self.graph):
            new, stops = max_length - context.shape[1], self._stops(stop, context.shape[1])
            return generate(cache, context, new, attention_mask=mask, graph=self.graph, stop=stops)
        more = (
            greedy_arguments(cache.model, self.tokenizer, bool(kwargs.get("do_sample")))
            | with_cache(cache.model, cache)
            | kwargs
        )
        return super()._model_generate(context, max_length, stop, attention_mask=mask, **more)

    def _greedy(self, asked: dict[str, Any]) -> bool:
        """Whether lm-eval asks for the most probable tokens and nothing else."""
        sampling = asked.get("do_sample") or asked.get("temperature") or self.mixed_precision_dtype
        return not sampling and not set(asked) - {"do_sample", "temperature"}

    def _stops(self, words: list[str], prompt: int) -> Callable[[Tensor], Tensor]:
        """Which rows have written one of these, which lm-eval cuts off with what follows."""

        def stop(ids: Int[Tensor, "rows tokens"]) -> Bool[Tensor, " rows"]:
            texts = self.tokenizer.batch_decode(ids[:, prompt:])
            found = [any(word in text for word in words) for text in texts]
            return torch.tensor(found, device=ids.device)

        return stop

    def _loglikelihood_tokens(
        self,
        requests: Sequence[Pair],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Called by lm-eval: (log-likelihood, whether greedy) of every continuation.

        Every context is read once, and each continuation gets a copy of its cache. As HFLM does, a
        context is cut on the left for each continuation by itself, so that both fit. Raises
        EvaluationError for a continuation that is too long.
        """
        found: dict[int, tuple[float, bool]] = {}
        groups: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise EvaluationError(
                    f"expected continuations of at most {self.max_length} tokens, the model's "
                    f"context, got {len(continuation)}"
                )
            room = self.max_length + 1 - len(continuation)  # its last token is not read
            groups.setdefault(tuple(context[-room:]), []).append(number)
        bar = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="scoring")
        for read_tokens, numbers in groups.items():
            ids = torch.tensor([read_tokens], device=self.device)
            cache = self.cache_of(ids, torch.ones_like(ids))
            for number in numbers:
                strings, _, continuation = requests[number]
                answer = score_continuation(cache.copy(), ids, continuation)
                found[number] = answer
                if strings is not None:
                    self.cache_hook.add_partial("loglikelihood", strings, answer)
                bar.update(1)
        bar.close()
        return [found[number] for number in range(len(requests))]


def _device(asked: str | None) -> str:
    """The device of lm-eval; the CPU where that is a GPU and there is none, as HFLM does."""
    if asked is None or (asked == DEVICE_OF_LM_EVAL and not torch.cuda.is_available()):
        return "auto"
    return asked


def read(
    cache: CompressedCache, ids: Int[Tensor, "rows tokens"], mask: Int[Tensor, "rows tokens"]
) -> None:
    """Read prompts into a cache, all but the last token, which is to see them compressed.

    Nothing is read where a prompt has no other token.
    """
    before = mask[:, :-1]
    if ids.shape[1] < 2 or not bool(before.any(1).all()):
        return
    positions = (before.cumsum(1) - 1).clamp_min(0)
    with torch.inference_mode():
        cache.model(
            ids[:, :-1],
            attention_mask=before,
            position_ids=positions,
            logits_to_keep=1,
            **with_cache(cache.model, cache),
        )


def continuation_logits(
    cache: CompressedCache, last: int, continuation: Sequence[int], rows: int = 1
) -> Float[Tensor, "rows new vocabulary"]:
    """Logits at every token of a continuation, on a cache of some rows that lacks `last`.

    Nothing is dropped from the cache meanwhile.
    """
    cache.frozen = True
    device = next(cache.model.parameters()).device
    tail = torch.tensor([[last, *continuation[:-1]]] * rows, device=device)
    with torch.inference_mode():
        return cache.model(tail, **with_cache(cache.model, cache)).logits


def score_continuation(
    cache: CompressedCache, ids: Int[Tensor, "1 tokens"], continuation: Sequence[int]
) -> tuple[float, bool]:
    """Its log-likelihood, and whether every token is the most probable one."""
    logits = continuation_logits(cache, int(ids[0, -1]), continuation)[0].float().log_softmax(-1)
    targets = torch.tensor(continuation, device=logits.device)
    each = logits.gather(1, targets[:, None])
    return float(each.sum()), bool((logits.argmax(-1) == targets).all())


def lm_eval_main(arguments: Sequence[str]) -> None:
    """lm-eval's own command line, which now knows the model type `tappa`."""
    from lm_eval.__main__ import cli_evaluate

    before = sys.argv
    sys.argv = ["lm-eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
