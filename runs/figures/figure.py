"""What the scripts of this folder share: read an Analysis and results, draw one figure.

Every script is `python runs/figures/NAME.py ANALYSIS [--results DIR] -o FILE.svg` (or .png, .pdf),
and draws what `tappa figures` draws under this name.
"""

import argparse
from pathlib import Path

from tappa.files import write_atomic
from tappa.report.content import content_of
from tappa.report.prints import figures


def main(name: str, description: str | None) -> None:
    """Draw the figure of this name; where there are several (`quality-*`), one file for each."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("analysis", type=Path, help="analysis.json of tappa analyze --out")
    parser.add_argument("--results", type=Path, help="folder of what eval and verify left")
    parser.add_argument("-o", "--out", type=Path, default=Path(f"{name}.svg"))
    options = parser.parse_args()
    kind = options.out.suffix.removeprefix(".").lower()
    found = figures(content_of([options.analysis], options.results), kind, only=name)
    if not found:
        parser.error(f"no data for {name}: is a folder of --results, or views.npz, missing?")
    for file, picture in found.items():
        more = Path(file).stem.removeprefix(name) if len(found) > 1 else ""
        print(f"wrote {write_atomic(options.out.with_stem(options.out.stem + more), picture)}")
