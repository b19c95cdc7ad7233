"""What is asked of a model: samples of lm-eval's tasks, and windows of text."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task

from tappa.errors import EvaluationError
from tappa.evaluation.fidelity import Reference
from tappa.evaluation.shared_prefill import Cell, GridLM
from tappa.files import digest_of

# names of the same setting, as lm-eval ranks them
_NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_OTHERS = "choose another task, or a model with a longer context"
_SHORTER = "choose shorter lengths"
_ADVICE = {  # for prompts that are too long, by suite
    "ruler": _SHORTER,
    "local": _SHORTER,
    "choice": _OTHERS,
    "longbench": "take its files from a folder of data, so that long prompts lose their middle",
    "lm-eval": _OTHERS,
}

Answer = dict[str, Any]  # `scores`: name -> number; and whatever else is worth keeping


class TaskSample:
    """A document of one of lm-eval's tasks, asked and scored as lm-eval does.

    Every metric of the task that is a number for a single sample becomes a score.
    """

    def __init__(self, suite: str, task: Task, instances: list[Instance], number: int) -> None:
        self.suite, self.number = suite, number
        self.task = str(task.config.task)
        self._task, self.instances = task, instances
        self.kind = instances[0].request_type
        if self.kind not in ("generate_until", "loglikelihood"):
            raise EvaluationError(f"{self.task} asks for {self.kind}, which no cache changes")
        asked = [(i.request_type, i.arguments) for i in instances]
        self.digest = digest_of(self.task, asked)

    @property
    def writes(self) -> bool:
        """Whether one text is written, so that many can be written side by side."""
        return self.kind == "generate_until" and len(self.instances) == 1

    def check_length(self, lm: GridLM) -> None:
        """Raises EvaluationError where the model's context would cut the prompt."""
        for instance in self.instances:
            if self.kind == "generate_until":
                prompt, asked = instance.args
                new = int(next((asked[x] for x in _NEW_TOKENS if x in asked), lm.max_gen_toks))
                tokens, most = len(lm.tok_encode(prompt)) + new, lm.max_length
            else:
                context, continuation = lm._encode_pair(*instance.args)
                tokens, most = len(context) + len(continuation), lm.max_length + 1  # last: unread
            if tokens > most:
                raise EvaluationError(
                    f"sample {self.number} of {self.task} needs {tokens} tokens with its answer, "
                    f"more than the model's context of {lm.max_length}: {_ADVICE[self.suite]}"
                )

    def answers(self, lm: GridLM, cells: Sequence[Cell]) -> list[Answer]:
        """Of every cell."""
        if self.writes:
            return write_together([self], lm, cells)[0]
        return [self._one_by_one(lm, cell) for cell in cells]

    def _one_by_one(self, lm: GridLM, cell: Cell) -> Answer:
        lm.answering([cell])
        return self.scored(getattr(lm, self.kind)(self.instances, disable_tqdm=True))

    def scored(self, responses: list[Any]) -> Answer:
        """Filter and score as lm-eval does for one document."""
        for instance, response in zip(self.instances, responses, strict=True):
            instance.resps, instance.filtered_resps = [response], {}
        for ensemble in self._task._filters:
            ensemble.apply(self.instances)
        first = next(iter(self.instances[0].filtered_resps))
        filtered = [instance.filtered_resps[first] for instance in self.instances]
        results = self._task.process_results(self.instances[0].doc, filtered)
        scores = {k: float(v) for k, v in results.items() if isinstance(v, int | float)}
        if not scores:
            raise EvaluationError(f"{self.task} has no metric of single samples")
        return {"scores": scores, "response": responses}


class TextSample:
    """A window of text: its end is predicted after the compressed beginning."""

    def __init__(self, task: str, number: int, context: list[int], following: list[int]) -> None:
        self.suite, self.task, self.number = task, task, number
        self._context, self._following = context, following
        self.digest = digest_of(task, [context, following])

    def answers(self, lm: GridLM, cells: Sequence[Cell]) -> list[Answer]:
        """Of every cell: KL, top-1 agreement, NLL and attention error (`Reference.compare`)."""
        full = lm.recording(tuple(self._context)).compress("full", [None])[0]
        reference = Reference(full, self._context[-1], self._following)
        found: dict[Cell, Answer] = {}
        for together in side_by_side(cells):
            lm.answering(together)
            tokens = torch.tensor([self._context] * len(together))
            cache = lm.cache_of(tokens, torch.ones_like(tokens))
            answers = reference.compare(cache, len(together))
            found |= {c: self._shaped(x) for c, x in zip(together, answers, strict=True)}
        return [found[cell] for cell in cells]

    def _shaped(self, scores: dict[str, Any]) -> Answer:
        layers = [round(x, 6) for x in scores.pop("layers")]
        if self.task.startswith("perplexity"):  # exp of the mean nll, which no single sample has
            scores = {"nll": scores["nll"]}
        return {"scores": scores, "layers": layers}


def side_by_side(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells whose caches make a good batch: those that keep everything, and all others."""
    parts = [[c for c in cells if (c.budget is None) == whole] for whole in (True, False)]
    return [part for part in parts if part]


def write_together(
    samples: Sequence[TaskSample], lm: GridLM, cells: Sequence[Cell]
) -> list[list[Answer]]:
    """The answers of every cell to samples of one task, written side by side."""
    found: dict[tuple[int, Cell], Answer] = {}
    for together in side_by_side(cells):
        keys = [(place, cell) for place in range(len(samples)) for cell in together]
        lm.answering(together, len(samples))
        requests = [samples[place].instances[0] for place, _ in keys]
        texts = lm.generate_until(requests, disable_tqdm=True)
        for key, text in zip(keys, texts, strict=True):
            found[key] = samples[key[0]].scored([text])
    return [[found[place, cell] for cell in cells] for place in range(len(samples))]


def answer(samples: Sequence["Sample"], lm: GridLM, cells: Sequence[Cell]) -> list[list[Answer]]:
    """The answers of every cell to some samples, together where that is possible."""
    writing = [sample for sample in samples if isinstance(sample, TaskSample) and sample.writes]
    if len(writing) == len(samples):
        return write_together(writing, lm, cells)
    return [sample.answers(lm, cells) for sample in samples]


# one thing to ask: `suite`, `task`, `number`, and a `digest` of all that decides the answers
Sample = TaskSample | TextSample


def samples_of_task(
    suite: str, task: Task, lm: GridLM, limit: int | None, chat: bool
) -> Iterator[TaskSample]:
    """The first `limit` documents of a task."""
    task.build_all_requests(
        limit=limit,
        rank=0,
        world_size=1,
        apply_chat_template=chat,
        chat_template=lm.apply_chat_template if chat else None,
        tokenizer_name=lm.tokenizer_name if chat else "",
    )
    documents: dict[int, list[Instance]] = {}
    for instance in task.instances:
        documents.setdefault(int(instance.doc_id or 0), []).append(instance)
    for number, instances in sorted(documents.items()):
        yield TaskSample(suite, task, sorted(instances, key=lambda i: i.idx), number)
