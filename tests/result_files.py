"""What eval, generate, prune and verify leave in a folder, small; also with hostile text."""

import json
from pathlib import Path
from typing import Any

HOSTILE = '</script><script>alert(1)</script>"><img src=x onerror=alert(1)>'


def row(method: str, budget: float | None, value: float, **more: Any) -> dict[str, Any]:
    sizes = {"tokens_held": budget or 300.0, "nbytes": 1000 * (budget or 300.0)}
    return {"method": method, "budget": budget, "n": 5, "mean": value, "error": 0.1} | sizes | more


TABLE: dict[str, Any] = {
    "name": "ruler: average",
    "metric": "score",
    "lower_is_better": False,
    "rows": [
        row("full", None, 0.9, compress_seconds=0.02),
        row("tappa", 128.0, 0.5, error=None, compress_seconds=0.3),
        row("tappa", 64.0, 0.4, compress_seconds=0.3),
        row("snapkv", 128.0, 0.3, compress_seconds=0.1),
        row("snapkv", 64.0, 0.2, compress_seconds=0.1),
    ],
}
PRUNING: dict[str, Any] = {
    "plan": {"layers": [1]},
    "layers": [
        {"layer": 0, "bi": 0.5, "bi_prime": 0.6, "removed": None},
        {"layer": 1, "bi": 0.1, "bi_prime": 0.2, "removed": 0},
    ],
    "before": {"parameters": 70, "nbytes": 280, "tokens_per_second": 11.0, "perplexity": 30.0},
    "after": {"parameters": 40, "nbytes": 160, "tokens_per_second": 19.0, "perplexity": 90.0},
}
GENERATION: dict[str, Any] = {
    "method": "tappa",
    "budget": 128,
    "new_tokens": 11,
    "prefill_seconds": 2.0,
    "decode_seconds": 5.0,
    "nbytes": 3_000_000,
}
MOVED = {"layer": 1, "head": 2, "source": 4, "base_factor": 1.0, "verdict": "pass", "error": 0.01}
MOVED |= {"lag0": 0.0, "reason": ""}
OBSERVED = {"variant": "pre_all_prompt", "low": 0.1, "high": 0.9, "n": 12}
VERIFICATION: dict[str, Any] = {
    "schema": "tappa.verification/1",
    "model": {"name": "tiny"},
    "tokens": 97,
    "passed": True,
    "bounds": [
        {"name": "vertical", "checked": 70, "violations": 0, "tightness": 3.5, "verdict": "pass"}
    ],
    "relocations": [
        MOVED | {"target": 2, "predicted": 13.0, "measured": 13.1, "attention": 12.9},
        MOVED | {"target": 3, "predicted": 19.0, "measured": None, "attention": None},
    ],
    "constructed": [
        {
            "pattern": "re-access",
            "observed": "re-access",
            "explained": name,
            "noise": 0.0,
            "seed": 0,
        }
        for name in ("sequential", "re-access")
    ],
    "observations": [
        OBSERVED | {"claim": "a: S tells", "figure": "AUROC", "value": 0.7},
        OBSERVED | {"claim": "b: S goes", "figure": "Spearman", "value": 0.3},
        OBSERVED | {"claim": "c: turns", "figure": "share", "value": 1.0, "low": None},
        OBSERVED | {"claim": "d: nothing", "figure": "share", "value": None},
    ],
    "resonances": [
        {"layer": 1, "head": 2, "target": t, "lags": [7, 14], "change": [0.5, 0.1 * t]}
        | {"expected": [0.7, 0.1]}
        for t in (2, 3)
    ],
    "sensitivity": [
        {"grain": "layers", "variant": "pre_all_prompt", "value": 0.5, "p": 0.01, "n": 2}
    ],
    "notes": [],
    "needs": [
        {"layer": 0, "dissimilarity": 0.2, "kl": 0.01},
        {"layer": 1, "dissimilarity": 0.3, "kl": 0.05},
    ],
}
FILES: dict[str, dict[str, Any]] = {
    "results.json": {"tables": [TABLE, TABLE | {"name": "another"}]},
    "pruning.json": PRUNING,
    "generation.json": GENERATION,
    "verification.json": VERIFICATION,
}


def changed(content: Any, kind: type, value: Any) -> Any:
    """The same with another value in place of everything of one kind."""
    if isinstance(content, dict):
        return {key: changed(x, kind, value) for key, x in content.items()}
    if isinstance(content, list):
        return [changed(x, kind, value) for x in content]
    return value if type(content) is kind else content


def leave(folder: Path, files: dict[str, Any] = FILES) -> Path:
    """Write the files into a folder of results."""
    (folder / "run").mkdir(parents=True)
    for name, content in files.items():
        (folder / "run" / name).write_text(json.dumps(content))
    return folder
