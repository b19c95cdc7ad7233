"""Numbers found in a long text, from the lines of runs/compression.py: shares, differences, p.

python runs/needles.py runs/data/needles-qwen2.5-coder-0.5b.jsonl
"""

import json
import sys
from pathlib import Path

from tappa.evaluation.statistics import mean_of, paired_difference

METHODS = ("cake", "tappa", "tappa(expected_share=0.0)", "tappa_paper", "snapkv")
BUDGETS = (128, 256, 512)


def main() -> None:
    lines = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    found: dict[tuple[str, int], dict[int, bool]] = {}
    for line in lines:
        found.setdefault((line["method"], line["budget"]), {})[line["prompt"]] = line["needle"]
    cells = [found[method, budget] for method in METHODS for budget in BUDGETS]
    prompts = sorted(set(cells[0]).intersection(*cells))
    print(f"n = {len(prompts)}, {sum(p % 2 for p in prompts)} of odd number")
    for method in METHODS:
        parts = []
        for budget in BUDGETS:
            mine, base = ([float(found[m, budget][p]) for p in prompts] for m in (method, "cake"))
            odd = mean_of([x for x, p in zip(mine, prompts, strict=True) if p % 2]).mean
            d = paired_difference(mine, base)
            parts.append(f"{mean_of(mine).mean:.2f} ({d.mean:+.2f}; {d.p:.3f}; odd {odd:.2f})")
        print(f"| {method} | " + " | ".join(parts) + " |")


if __name__ == "__main__":
    main()
