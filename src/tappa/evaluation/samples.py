"""What is asked of a model: samples of lm-eval's tasks, and windows of text."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task

from tappa.errors import EvaluationError
from tappa.evaluation.fidelity import Reference
from tappa.evaluation.shared_prefill import GridLM

Answer = dict[str, Any]  # `scores`: name -> number; and whatever else is worth keeping


class TaskSample:
    """A document of one of lm-eval's tasks, asked and scored as lm-eval does.

    Every metric of the task that is a number for a single sample becomes a score.
    """

    def __init__(self, suite: str, task: Task, instances: list[Instance], number: int) -> None:
        self.suite, self.number = suite, number
        self.task = str(task.config.task)
        self._task, self._instances = task, instances
        self.kind = instances[0].request_type
        if self.kind not in ("generate_until", "loglikelihood"):
            raise EvaluationError(f"{self.task} asks for {self.kind}, which no cache changes")
        asked = [(i.request_type, i.arguments) for i in instances]
        self.digest = digest_of(self.task, asked)

    def answer(self, lm: GridLM) -> Answer:
        """Ask, filter, score: lm-eval's own steps for one document."""
        responses = getattr(lm, self.kind)(self._instances, disable_tqdm=True)
        for instance, response in zip(self._instances, responses, strict=True):
            instance.resps, instance.filtered_resps = [response], {}
        for ensemble in self._task._filters:
            ensemble.apply(self._instances)
        first = next(iter(self._instances[0].filtered_resps))
        filtered = [instance.filtered_resps[first] for instance in self._instances]
        results = self._task.process_results(self._instances[0].doc, filtered)
        scores = {k: float(v) for k, v in results.items() if isinstance(v, int | float)}
        if not scores:
            raise EvaluationError(f"{self.task} has no metric of single samples")
        return {"scores": scores, "response": responses}


class TextSample:
    """A window of text: its end is predicted after the compressed beginning."""

    def __init__(self, task: str, number: int, context: list[int], following: list[int]) -> None:
        self.suite, self.task, self.number = task, task, number
        self._context, self._following = context, following
        self._reference: Reference | None = None
        self.digest = digest_of(task, [context, following])

    def answer(self, lm: GridLM) -> Answer:
        """KL, top-1 agreement, NLL and attention error (`Reference.compare`)."""
        tokens = torch.tensor([self._context])
        if self._reference is None:
            full = lm.recording(tuple(self._context)).compress("full", [None])[0]
            self._reference = Reference(full, self._context[-1], self._following)
        cache = lm.cache_of(tokens, torch.ones_like(tokens))
        found = self._reference.compare(cache)
        layers = found.pop("layers")
        if self.task == "perplexity":  # of single samples: nll, whose mean's exp it is
            found = {"nll": found["nll"]}
        return {"scores": found, "layers": [round(x, 6) for x in layers]}


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


def digest_of(*parts: Any) -> str:
    """A short fingerprint of anything that can be written as JSON."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
