"""How well explained predicts observed: a Markdown table, one column for each model named.

python runs/agreement.py [MODEL ...]   (the packaged model if none; packaged text, 2048 tokens)

Each column is kept as runs/data/agreement-NAME.json, which can be named in place of the model:
python runs/agreement.py runs/data/agreement-*.json
"""

import json
import sys
from pathlib import Path

import tappa
from tappa.patterns import LABELS
from tappa.texts import packaged_text

DATA = Path(__file__).parent / "data"


def column(name: str | None) -> dict[str, str]:
    """The figures of one model, or those in a file that an earlier run has kept."""
    if name is not None and name.endswith(".json"):
        kept: dict[str, str] = json.loads(Path(name).read_text(encoding="utf-8"))
        return kept
    found = measured(name)
    file = DATA / f"agreement-{found['model'].removesuffix('.gguf').lower()}.json"
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def measured(name: str | None) -> dict[str, str]:
    """The figures of one model."""
    model, tokenizer = tappa.load(name)
    summary = tappa.analyze(model, tokenizer, packaged_text(), tokens=2048).summary()
    figures, heads = summary["agreement"], summary["heads"]
    confusion = figures["confusion"]
    right = {o: f"{row[o]} of {sum(row.values())}" for o, row in confusion.items()}
    return {
        "model": str(name or summary["model"]["name"]).split("/")[-1],
        "heads": str(len(heads)),
        "bound violations": str(summary["bound_violations"]),
        "bound checks": f"{summary['bounds_checked']:,}",
        **{f"{name}: explained, of observed": right[name] for name in LABELS},
        "accuracy": f"{figures['accuracy']:.2f}",
        "balanced accuracy": f"{figures['balanced_accuracy']:.2f}",
        **{
            f"Spearman of {name}": f"{figures[key]:.2f}"
            for name, key in (
                ("expected and real vertical persistence", "spearman_expected_vertical"),
                ("expected and real diagonal persistence", "spearman_expected_diagonal"),
                ("expected and real predictability", "spearman_expected_predictability"),
                ("expected and real strength of the period", "spearman_expected_period_strength"),
                ("q-similarity and predictability", "spearman_q_similarity_predictability"),
            )
        },
    }


def main() -> None:
    columns = [column(name) for name in sys.argv[1:] or [None]]
    for number, key in enumerate(columns[0]):
        print("| " + " | ".join([key if number else "", *(c[key] for c in columns)]) + " |")
        if number == 0:
            print("|---" * (len(columns) + 1) + "|")


if __name__ == "__main__":
    main()
