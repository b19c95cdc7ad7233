"""Draw cost curves: `cost_curves.py FILE...`, of benchmarks/kernels_gpu.py and gpu/decode.py.

One PNG beside a file for each axis: time over tokens, heads or the budget, with the order fitted to
the upper half of the sizes. Both axes are logarithmic, but for steps, which are to be flat.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

EXPECTED = {  # orders, where theory knows one
    "q-similarity by tokens": 1,
    "profile by tokens": 2,
    "q-similarity by heads": 1,
    "profile by heads": 1,
    "budget 1024 by tokens seen": 0,
}
UNITS = {  # what is timed, by axis
    "tokens": "one layer",
    "heads": "one layer",
    "budget": "one decoding step",
    "tokens seen": "one decoding step",
    "KV heads": "the attention of one decoding step",
}


def order(curve: dict[str, float]) -> float:
    """Slope of log time against log size, of the upper half of the sizes."""
    points = np.log([(int(size), ms) for size, ms in curve.items()])[len(curve) // 2 :]
    return float(np.polyfit(*points.T, 1)[0])


def draw(axis: str, curves: dict[str, Any], gpu: str, path: Path) -> None:
    figure, plot = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, curve in curves.items():
        known = f", expected {EXPECTED[name]}" if name in EXPECTED else ""
        label = f"{name.split(' by ')[0]}: order {order(curve['ms']):.2f}{known}"
        sizes = [int(size) for size in curve["ms"]]
        plot.loglog(sizes, list(curve["ms"].values()), "o-", base=2, label=label)
    if UNITS[axis] == "one decoding step":  # which is to be flat
        plot.set_yscale("linear")
        plot.set_ylim(bottom=0)
    else:
        plot.set_yscale("log")
    plot.set(xlabel=axis, ylabel=f"milliseconds for {UNITS[axis]}", title=gpu)
    plot.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+")
    for file in parser.parse_args().files:
        content = json.loads(file.read_text())
        gpu = next(f["gpu"] for f in content["figures"] if f["what"] == "machine")
        curves = content["curves"]
        for axis in dict.fromkeys(name.split(" by ")[1] for name in curves):
            chosen = {n: c for n, c in curves.items() if n.split(" by ")[1] == axis}
            draw(axis, chosen, gpu, file.with_name(f"cost-by-{axis.replace(' ', '-')}.png"))


if __name__ == "__main__":
    main()
