"""How much each compression method loses: KL to the full cache, and numbers found in a long text.

    python runs/compression.py run MODEL --text DIR --out results.jsonl [--shard 0/4] ...
    python runs/compression.py table results*.jsonl [--against cake] [--half report]

`run` writes one JSON line for each prompt, method and budget. A prompt is a window of the texts,
starting anywhere; prompts of even number (half "tune") lie in the first half of the texts, those
of odd number ("report") in the second: a default chosen on one is judged on the other.

KL: the prompt is compressed, then its next 64 true tokens are fed; mean over them of the divergence
from the full cache. Needle: four sentences with a 4-digit number each are put into the prompt,
which ends with the question for one of them; 1 if every digit has the highest logit.
"""

import argparse
import json
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import tappa
from tappa.cache_argument import with_cache
from tappa.compression import METHODS, CompressedCache, parse_method
from tappa.texts import packaged_text

NEXT = 64
CITIES = ("Lisbon", "Quito", "Oslo", "Hanoi", "Dakar", "Perth", "Lima", "Turin")
DEFAULT_METHODS = [name for name in METHODS if name != "full"]


def windows(
    ids: list[int], tokens: int, prompts: int, seed: int
) -> Iterator[tuple[int, list[int]]]:
    """Number and tokens of each prompt with the NEXT tokens after it."""
    middle = len(ids) // 2
    for number in range(prompts):
        low, high = (0, middle) if number % 2 == 0 else (middle, len(ids))
        start = random.Random(f"{seed}/{number}").randrange(low, high - tokens - NEXT)
        yield number, ids[start : start + tokens + NEXT]


def needle_prompt(
    tokenizer: Any, text: list[int], tokens: int, seed: str
) -> tuple[list[int], list[int]]:
    """The prompt, which ends with a question, and the tokens of the answer."""
    rng = random.Random(seed)
    cities, numbers = rng.sample(CITIES, 4), [str(rng.randrange(1000, 9999)) for _ in range(4)]
    facts = [f" The special number of {c} is {n}." for c, n in zip(cities, numbers, strict=True)]
    question = f"\n\nThe special number of {cities[0]} is"
    known, asked = [tokenizer(f, add_special_tokens=False).input_ids for f in (facts, question)]
    answer = tokenizer(f" {numbers[0]}", add_special_tokens=False).input_ids
    body = text[: tokens - len(asked) - sum(len(fact) for fact in known)]
    places = sorted(rng.sample(range(len(body) // 10, len(body) * 9 // 10), 4))
    order = rng.sample(range(4), 4)
    pieces, last = [], 0
    for place, fact in zip(places, order, strict=True):
        pieces += body[last:place] + known[fact]
        last = place
    return pieces + body[last:] + asked, answer


class Question:
    """A prompt, read once without its last token, and the tokens that follow it.

    The last token of the prompt comes after compression, as the first of the following tokens.
    """

    def __init__(self, model: Any, prompt: list[int], following: list[int]) -> None:
        self.model, self.device = model, next(model.parameters()).device
        self.recording = tappa.record(model, torch.tensor([prompt[:-1]]))
        self.tail = torch.tensor([[prompt[-1], *following]], device=self.device)
        self.full = self.after(self.recording.compress("full", [None])[0])

    def after(self, cache: CompressedCache) -> Tensor:
        """Log-probabilities of each following token."""
        cache.frozen = True
        with torch.inference_mode():
            logits = self.model(self.tail, **with_cache(self.model, cache)).logits
        return logits[0, :-1].float().log_softmax(-1)

    def right(self, logits: Tensor) -> bool:
        """Whether each following token is the most probable one."""
        return bool((logits.argmax(-1) == self.tail[0, 1:]).all())


def measure(model: Any, tokenizer: Any, window: list[int], o: Any, seed: str) -> Iterator[dict]:
    """A line for every method and budget on one prompt."""
    prompt, following = window[: o.tokens], window[o.tokens : o.tokens + NEXT]
    text, needle = None, None
    line: dict[str, Any] = {"method": "full", "budget": 0}
    if "kl" in o.measure:
        text = Question(model, prompt, following)
        line["kl"] = 0.0
    if "needle" in o.measure:
        needle = Question(model, *needle_prompt(tokenizer, prompt, o.tokens, seed))
        line["needle"] = needle.right(needle.full)
    yield line
    for name in o.methods:
        base, options = parse_method(name)
        lines = [{"method": name, "budget": budget} for budget in o.budgets]
        for question in (text, needle):
            if question is None:
                continue
            caches = question.recording.compress(base, o.budgets, **options)
            for line, cache in zip(lines, caches, strict=True):
                line["held"] = cache.tokens_held()
                logits = question.after(cache)
                if question is needle:
                    line["needle"] = needle.right(logits)
                else:
                    lost = question.full.exp() * (question.full - logits)
                    line["kl"] = float(lost.sum(-1).mean())
        yield from lines


def run(o: Any) -> None:
    loaded = tappa.load(o.model, dtype=o.dtype)
    text = packaged_text()
    if o.text:
        files = sorted(Path(o.text).glob("*.txt"))
        text = "\n\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
    ids = loaded.tokenizer(text, verbose=False).input_ids
    part, parts = map(int, o.shard.split("/"))
    chosen = [w for w in windows(ids, o.tokens, o.prompts, o.seed) if w[0] // 2 % parts == part]
    if o.only:
        chosen = [w for w in chosen if w[0] in o.only]
    if o.half:
        chosen = [w for w in chosen if w[0] % 2 == ("tune", "report").index(o.half)]
    with Path(o.out).open("w") as out:
        for count, (number, window) in enumerate(chosen, 1):
            for line in measure(loaded.model, loaded.tokenizer, window, o, f"{o.seed}/{number}"):
                out.write(json.dumps({"prompt": number, **line}) + "\n")
            out.flush()
            print(f"{count} of {len(chosen)} prompts", file=sys.stderr)


def flips(differences: np.ndarray, n: int = 20_000) -> float:
    """Two-sided p of a paired sign-flip test of the mean."""
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (n, len(differences)))
    means = (signs * differences).mean(1)
    return float((1 + (abs(means) >= abs(differences.mean()) - 1e-15).sum()) / (n + 1))


def table(o: Any) -> None:
    lines = [json.loads(x) for file in o.files for x in Path(file).read_text().splitlines()]
    if o.half:
        lines = [x for x in lines if x["prompt"] % 2 == ("tune", "report").index(o.half)]
    budgets = sorted({x["budget"] for x in lines} - {0})
    kl: dict[tuple[str, int], dict[int, float]] = {}
    needle: dict[tuple[str, int], dict[int, bool]] = {}
    for x in lines:
        for name, found in (("kl", kl), ("needle", needle)):
            if name in x:
                found.setdefault((x["method"], x["budget"]), {})[x["prompt"]] = x[name]
    prompts = sorted(kl["full", 0])
    print(f"n = {len(prompts)} prompts", end="")
    if needle:
        full = list(needle["full", 0].values())
        found = f"needles found with the full cache: {np.mean(full):.2f} (n = {len(full)})"
        print(f"; {found}", end="")
    print(f"; t and p of the paired difference from {o.against}\n")
    head = [f"KL @{b} ± s.e. (t; p)" for b in budgets]
    head += [f"needle @{b}" for b in budgets if needle]
    print("| method | " + " | ".join(head) + " |\n" + "|---" * (len(head) + 1) + "|")
    for method in dict.fromkeys(x["method"] for x in lines if x["method"] != "full"):
        cells = []
        for b in budgets:
            mine = np.array([kl[method, b][p] for p in prompts])
            base = np.array([kl[o.against, b][p] for p in prompts])
            cell = f"{mine.mean():.3f} ± {mine.std(ddof=1) / math.sqrt(len(mine)):.3f}"
            if method != o.against:
                d = mine - base
                error = d.std(ddof=1) / math.sqrt(len(d))
                p = f"{flips(d):.4f}"
                p = "<.0001" if p == "0.0000" else p
                cell += f" ({d.mean() / error:+.1f}; {p})" if error > 0 else ""
            cells.append(cell)
        cells += [f"{np.mean(list(needle[method, b].values())):.2f}" for b in budgets if needle]
        print(f"| {method} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    r = commands.add_parser("run")
    r.set_defaults(call=run)
    r.add_argument("model", nargs="?")
    r.add_argument("--text", help="folder of .txt files (default: the packaged text)")
    r.add_argument("--out", required=True)
    r.add_argument("--tokens", type=int, default=4096)
    r.add_argument("--prompts", type=int, default=96)
    r.add_argument("--seed", type=int, default=0)
    r.add_argument("--shard", default="0/1", help="this part of so many")
    r.add_argument("--only", type=int, nargs="+", help="these prompts of all")
    r.add_argument("--half", choices=["tune", "report"])
    r.add_argument("--budgets", type=int, nargs="+", default=[128, 256, 512])
    r.add_argument("--methods", nargs="+", default=DEFAULT_METHODS)
    r.add_argument("--measure", nargs="+", choices=["kl", "needle"], default=["kl", "needle"])
    r.add_argument("--dtype", default="auto")
    t = commands.add_parser("table")
    t.set_defaults(call=table)
    t.add_argument("files", nargs="+")
    t.add_argument("--against", default="cake")
    t.add_argument("--half", choices=["tune", "report"])
    options = parser.parse_args()
    options.call(options)


if __name__ == "__main__":
    main()
