"""The table of methods: every one is a token scorer and a budget rule."""

import inspect
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from tappa.compression import budgets, scorers
from tappa.compression.budgets import Rule
from tappa.compression.options import check_range
from tappa.compression.scorers import Scorer
from tappa.errors import CompressionError
from tappa.similarity import DEFAULT, Variant
from tappa.wording import described, did_you_mean

Sharing = Literal["heads", "pooled"]


@dataclass(frozen=True)
class Method:
    """How a cache is compressed.

    The last `window` tokens and the first `sinks` always stay. With `sharing` "pooled" the KV heads
    of a layer share its budget by score, each at least `floor` of an equal share (AdaKV). Every
    layer gets at least `layer_floor` of the average budget.
    """

    scorer: Scorer = field(repr=False)
    rule: Rule | None = field(repr=False)  # None: nothing is dropped
    window: int = 32
    sinks: int = 0
    sharing: Sharing = "heads"
    floor: float = 0.2
    layer_floor: float = 0.0
    name: str = "custom"

    def __post_init__(self) -> None:
        needs = self.scorer.needs | (self.rule.needs if self.rule else set())
        check_range("window", self.window, 1 if needs & {"window", "predictability"} else 0)
        check_range("sinks", self.sinks, 0)
        check_range("floor", self.floor, 0, 1)
        check_range("layer_floor", self.layer_floor, 0, 1)

    @property
    def least(self) -> int:
        """Tokens that always stay, and that a budget must have room for."""
        return self.window + self.sinks


def full() -> Method:
    """Everything stays: the reference."""
    return Method(scorers.recency(), None)


def streaming_llm(window: int = 32, sinks: int = 4) -> Method:
    """The first and the most recent tokens (arXiv 2309.17453)."""
    return Method(scorers.recency(), budgets.uniform(), window, sinks)


def h2o(window: int = 32) -> Method:
    """Heavy hitters: attention received from all queries so far (arXiv 2306.14048)."""
    return Method(scorers.received(), budgets.uniform(), window)


def snapkv(window: int = 32, kernel: int = 5) -> Method:
    """Attention of the last queries, pooled (arXiv 2404.14469)."""
    return Method(scorers.window_mean(kernel), budgets.uniform(), window)


def pyramidkv(window: int = 32, kernel: int = 5, beta: float = 20.0) -> Method:
    """SnapKV's scores, more tokens for lower layers (arXiv 2406.02069)."""
    return Method(scorers.window_mean(kernel), budgets.pyramid(beta), window)


def expected_attention(window: int = 0, sinks: int = 4, future: int = 512) -> Method:
    """Attention expected from future queries (arXiv 2510.00636)."""
    return Method(scorers.expected_attention(future), budgets.uniform(), window, sinks)


def cake(
    window: int = 32, kernel: int = 5, gamma: float = 200.0, tau1: float = 1.0, tau2: float = 1.0
) -> Method:
    """Mean, variance of the last queries' attention; layers by its entropy (arXiv 2503.12491)."""
    return Method(scorers.window_mean_var(gamma, kernel), budgets.cake(tau1, tau2), window)


def tappa_paper(
    window: int = 32,
    kernel: int = 5,
    gamma: float = 200.0,
    alpha: float = math.inf,
    tau1: float = 1.0,
    tau2: float = 1.0,
) -> Method:
    """CAKE's scores; layers by 1 - q-similarity after RoPE, last 32 queries (arXiv 2601.21709)."""
    rule = budgets.tappa_paper(alpha, tau1, tau2)
    return Method(scorers.window_mean_var(gamma, kernel), rule, window)


def adakv(window: int = 32, kernel: int = 5, floor: float = 0.2) -> Method:
    """SnapKV's scores, the heads of a layer share its budget by score (arXiv 2407.11550)."""
    rule = budgets.uniform()
    return Method(scorers.window_mean(kernel), rule, window, sharing="pooled", floor=floor)


def tappa(
    window: int = 32,
    kernel: int = 9,
    exponent: float = 2.0,
    variant: Variant = DEFAULT,
    cake_share: float = 0.5,
    per_head: bool = False,
    floor: float = 0.2,
    layer_floor: float = 0.0,
    expected_share: float = 0.0,
    gamma: float = 200.0,
) -> Method:
    """CAKE's scores, pooled wider; layers by P_CAKE and (1 - S)^2, heads by score (tappa)."""
    rule = budgets.similarity(exponent, variant, per_head, cake_share)
    return Method(
        scorers.mixed(expected_share, scorers.window_mean_var(gamma, kernel)),
        rule,
        window,
        sharing="heads" if per_head else "pooled",
        floor=floor,
        layer_floor=layer_floor,
    )


def duo_attention(window: int = 32, sinks: int = 4) -> Method:
    """All tokens for unpredictable heads, first and last ones for the others (arXiv 2410.10819)."""
    return Method(scorers.recency(), budgets.retrieval_heads(), window, sinks)


METHODS: dict[str, Callable[..., Method]] = {
    f.__name__: f
    for f in (
        *(full, streaming_llm, h2o, snapkv, pyramidkv, expected_attention, cake, tappa_paper),
        *(adakv, tappa, duo_attention),
    )
}


def describe_methods() -> dict[str, str]:
    """Name and one line on each method, its source at the end."""
    return {name: (f.__doc__ or "").splitlines()[0] for name, f in METHODS.items()}


def parse_method(text: str) -> tuple[str, dict[str, Any]]:
    """`tappa(gamma=50,per_head=true,variant=post_all_window)` -> its name and options.

    Raises CompressionError for what is not of this form; names and options are not looked up.
    """
    found = re.fullmatch(r"\s*([a-z0-9_+]+)\s*(?:\((.*)\))?\s*", text)
    if not found:
        raise CompressionError(f"expected a method as name(option=value,...), got {text!r}")
    options: dict[str, Any] = {}
    for part in (found[2] or "").split(","):
        if not part.strip():
            continue
        name, _, value = (x.strip() for x in part.partition("="))
        try:
            options[name] = Variant(*value.split("_")) if name == "variant" else json.loads(value)
        except (ValueError, TypeError):
            raise CompressionError(f"expected option=value, got {part!r} in {text!r}") from None
    return found[1], options


def spelled_out(text: str) -> str:
    """A method with all its options, those by default too: what its answers mean.

    `snapkv(kernel=7)` -> `snapkv(window=32,kernel=7)`. Raises CompressionError for what is none.
    """
    name, options = parse_method(text)
    method_named(name, **options)
    parts = []
    for part in name.split("+"):
        taken = inspect.signature(METHODS[part]).parameters.values()
        values = {one.name: options.get(one.name, one.default) for one in taken}
        numbers = {one.name for one in taken if isinstance(one.default, float)}  # 50 means 50.0
        texts = (f"{k}={float(v) if k in numbers else v}" for k, v in values.items())
        parts.append(f"{part}({','.join(texts)})")
    return "+".join(parts)


def split_methods(text: str) -> list[str]:
    """`a,b(x=1,y=2)` -> its methods: a comma inside of brackets does not separate."""
    parts = [part.strip() for part in re.split(r",(?![^()]*\))", text)]
    return [part for part in parts if part]


def method_named(name: "str | Method", **options: Any) -> Method:
    """The method of this name; `"a+b"` has the scorer of a and the budget rule of b.

    Options go to every part that knows them; some may be in the name, as in `"cake(gamma=50)"`.
    Raises CompressionError for names and options that no part knows.
    """
    if isinstance(name, Method):
        known = {one.name for one in fields(Method)}
        for option in options.keys() - known:
            raise CompressionError(f"a Method has {', '.join(sorted(known))}; no {option!r}")
        return replace(name, **options) if options else name
    if not isinstance(name, str):
        raise CompressionError(f"expected a method as its name or a Method, got {described(name)}")
    if "(" in name:
        name, inside = parse_method(name)
        if twice := inside.keys() & options.keys():
            raise CompressionError(f"the option {min(twice)!r} of {name} is given twice")
        options |= inside
    parts = name.split("+")
    unknown = [part for part in parts if part not in METHODS]
    if unknown or len(parts) > 2:
        wrong = unknown[0] if unknown else name
        hint = did_you_mean(wrong, METHODS)
        raise CompressionError(f"expected a method of {', '.join(METHODS)}, got {wrong!r}{hint}")
    takes = {part: set(inspect.signature(METHODS[part]).parameters) for part in parts}
    for option in options:
        if not any(option in names for names in takes.values()):
            all_of_them = ", ".join(sorted(set().union(*takes.values()))) or "no options"
            hint = did_you_mean(option, set().union(*takes.values()))
            raise CompressionError(f"{name} takes {all_of_them}; it has no option {option!r}{hint}")
    made = [
        METHODS[part](**{k: v for k, v in options.items() if k in takes[part]}) for part in parts
    ]
    if len(made) == 1:
        return replace(made[0], name=name)
    first, second = made
    window, sinks = max(first.window, second.window), max(first.sinks, second.sinks)
    return replace(second, scorer=first.scorer, window=window, sinks=sinks, name=name)
