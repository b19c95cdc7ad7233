"""Draw the cost curves that benchmarks/kernels_gpu.py measured: `cost_curves.py kernels-gpu.json`.

One PNG beside the file for each axis: time over tokens and over heads, logarithmic, with the order
fitted to the upper half of the sizes.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

EXPECTED = {
    "q-similarity by tokens": 1,
    "profile by tokens": 2,
    "q-similarity by heads": 1,
    "profile by heads": 1,
}


def draw(axis: str, curves: dict[str, Any], gpu: str, path: Path) -> None:
    figure, plot = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, curve in curves.items():
        sizes = [int(size) for size in curve["ms"]]
        slope = curve["slope_of_upper_half"]
        label = f"{name.split(' by ')[0]}: order {slope:.2f}, expected {EXPECTED[name]}"
        plot.loglog(sizes, list(curve["ms"].values()), "o-", base=2, label=label)
    plot.set_yscale("log")
    plot.set(xlabel=axis, ylabel="milliseconds for one layer", title=gpu)
    plot.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    file: Path = parser.parse_args().file
    content = json.loads(file.read_text())
    gpu = next(f["gpu"] for f in content["figures"] if f["what"] == "machine")
    for axis in ("tokens", "heads"):
        chosen = {n: c for n, c in content["curves"].items() if n.endswith(f" by {axis}")}
        draw(axis, chosen, gpu, file.with_name(f"cost-by-{axis}.png"))


if __name__ == "__main__":
    main()
