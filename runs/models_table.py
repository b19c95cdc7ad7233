"""What works on which architecture: docs/models.md, from tiny random models of all that there are.

python runs/models_table.py                      every causal architecture of transformers, anew
python runs/models_table.py --only llama,gemma2  print the rows of some; nothing is written
python runs/models_table.py --real MODEL ...     try real models too: runs/data/models-real.json

Each architecture is tried in a process of its own with a time limit. "fault" is an error that tappa
does not explain in one line, or a result that is wrong.
"""

import argparse
import json
import multiprocessing
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tiny_models import CannotBuild, tiny
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

import tappa
from tappa.cache_argument import with_cache
from tappa.capture import LayerView, prefill
from tappa.checkpoint import LoadedModel, first_line
from tappa.models import require_rope
from tappa.pruning import Windows
from tappa.report.content import content_of
from tappa.texts import encode_texts, packaged_text
from tappa.verification.verify import Verification, verify

ROOT = Path(__file__).parents[1]
PAGE, REAL = ROOT / "docs" / "models.md", ROOT / "runs" / "data" / "models-real.json"
LIMIT = 120  # seconds for all operations on one tiny model
TOKENS, BUDGET, NEW = 96, 48, 6
WORKS = "yes"
Make = Callable[[], LoadedModel]


class Wrong(Exception):
    """A result that is not what it must be."""


class Partly(Exception):
    """Something was left out, and why."""


def check(holds: bool, what: str) -> None:
    """Raises Wrong."""
    if not holds:
        raise Wrong(what)


def analyze(make: Make) -> None:
    """Figures of every head, attention as the model's own; written, read, merged, reported on."""
    model, tokenizer = make()
    found = tappa.analyze(model, tokenizer, packaged_text(), tokens=TOKENS)
    check(found.summary()["bound_violations"] == 0, "bounds violated")
    _check_attention(model, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        file = found.save(Path(folder, "analysis.json"))
        read = tappa.Analysis.load(file)
        check(read.heads == found.heads, "what is read back differs")
        check(len(read.merge(found).heads) == len(found.heads), "merged it has other heads")
        content_of([file])
    chunked = tappa.analyze(model, tokenizer, packaged_text(), tokens=TOKENS, chunk=40)
    for one, other in zip(found.heads, chunked.heads, strict=True):
        apart = abs(one["q_similarity"] - other["q_similarity"])
        check(apart < 1e-3, f"in chunks q-similarity differs by {apart:.1g}")


def _check_attention(model: PreTrainedModel, tokenizer: Any) -> None:
    """What the analysis sees must give the attention that the model itself returns."""
    ids = torch.tensor(encode_texts(tokenizer, [packaged_text()], TOKENS))
    own = model.config._attn_implementation
    try:
        model.set_attn_implementation("eager")
        with torch.inference_mode():
            weights = model(ids, output_attentions=True, use_cache=False).attentions
        views: dict[int, LayerView] = {}
        prefill(model, ids, lambda view: views.__setitem__(view.layer, view))
    except ValueError:
        return  # a model that has no eager attention, or returns none
    finally:
        model.set_attn_implementation(own)
    returned = [w for w in weights or () if w is not None and w.ndim == 4]
    if len(returned) != len(views):
        return
    for expected, layer in zip(returned, sorted(views), strict=True):
        apart = float((_attention(views[layer]) - expected[0].double()).abs().max())
        check(apart < 1e-4, f"attention of layer {layer} differs by {apart:.1g}")


def _attention(view: LayerView) -> torch.Tensor:
    """Attention weights, from the view alone: (heads, steps, past)."""
    keys = view.keys.double().repeat_interleave(len(view.queries) // len(view.keys), 0)
    rows, columns = torch.arange(view.queries.shape[1]), torch.arange(keys.shape[1])
    logits = view.attention.logits(view.queries.double(), keys.mT)
    seen = view.attention.visible(rows, columns)
    return logits.masked_fill(~seen, -torch.inf).softmax(-1)


def compress(make: Make, method: str) -> None:
    """A budget is held while text is written; one that drops nothing changes no logits."""
    model, tokenizer = make()
    ids = torch.tensor(encode_texts(tokenizer, [packaged_text()], TOKENS))
    with torch.inference_mode():
        plain = model(ids, use_cache=False).logits
        whole = tappa.compressed(model, method, TOKENS + NEW)
        logits = model(ids, **with_cache(model, whole), use_cache=True).logits
    size = float(plain.abs().max())
    check(float((logits - plain).abs().max()) < 1e-3 * size, "logits differ although all is kept")
    cache = tappa.compressed(model, method, BUDGET, every=1)
    out = model.generate(ids, **with_cache(model, cache), max_new_tokens=NEW, do_sample=False)
    check(out.shape[1] == TOKENS + NEW, f"{out.shape[1]} tokens came")
    held = cache.tokens_held()
    check(0.5 * BUDGET <= held <= BUDGET, f"{held:.0f} tokens are held, of a budget of {BUDGET}")


def prune(make: Make, **amounts: int) -> None:
    """Less is left, and saved and loaded by plain transformers it computes the same."""
    model, tokenizer = make()
    windows = Windows.of(model, tokenizer, packaged_text(), window=64, stride=64, limit=2)
    known = tappa.pruning.calibrate_on(model, windows)
    before = model.num_parameters()
    tappa.prune(model, known, **amounts)
    check(model.num_parameters() < before, "it is as large as before")
    ids = torch.tensor(encode_texts(tokenizer, [packaged_text()], TOKENS))
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        model.save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        expected, got = (m(ids, use_cache=False).logits for m in (model, again))
    size = float(expected.abs().max())
    check(float((got - expected).abs().max()) < 1e-3 * size, "loaded again it computes otherwise")


def verified(make: Make) -> None:
    """The claims that alter a model, and the bounds."""
    model, tokenizer = make()
    claims = ("bounds", "relocation", "base", "sensitivity")
    wanted = Verification(claims=claims, tokens=2 * TOKENS, count=1, prompts=1)
    notes = verify(model, tokenizer, wanted, texts={"prose": packaged_text()}).notes
    if notes:
        raise Partly("; ".join(notes))


OPERATIONS: dict[str, Callable[[Make], None]] = {
    "analyze": analyze,
    "compress: tappa": lambda make: compress(make, "tappa"),
    "compress: snapkv": lambda make: compress(make, "snapkv"),
    "prune layers": lambda make: prune(make, layers=1),
    "prune KV heads": lambda make: prune(make, kv_groups=1),
    "verify": verified,
}


def tried(make: Make) -> dict[str, str]:
    """Of every operation: "yes", why it is refused, or what is at fault."""
    found = {}
    for name, operation in OPERATIONS.items():
        try:
            operation(make)
            found[name] = WORKS
        except tappa.TappaError as error:
            found[name] = f"refused: {first_line(error)}"
        except Partly as error:
            found[name] = f"partly: {error}"
        except Wrong as error:
            found[name] = f"fault: {error}"
        except Exception as error:  # what tappa does not explain
            found[name] = f"fault: {type(error).__name__}: {first_line(error)}"
    return found


def try_tiny(kind: str) -> dict[str, str]:
    """One architecture; "no model" or "no RoPE" stand for all operations."""
    from tiny import tiny_tokenizer

    try:
        model = tiny(kind)
        with torch.inference_mode():
            model(torch.randint(3, 99, (1, TOKENS)))
    except CannotBuild as error:
        return {"no model": first_line(error)}
    except Exception as error:  # sizes that do not fit each other
        return {"no model": f"{type(error).__name__}: {first_line(error)}"}
    try:
        require_rope(model)
    except tappa.TappaError as error:
        return {"no RoPE": first_line(error)}
    found = tried(lambda: LoadedModel(tiny(kind), tiny_tokenizer()))
    return {"class": type(model).__name__, **found}


def in_process(kind: str) -> dict[str, str]:
    """`try_tiny` in a fork of this process, which ends after LIMIT seconds."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def work() -> None:
        signal.alarm(LIMIT)
        theirs.send(try_tiny(kind))

    process = context.Process(target=work)
    process.start()
    theirs.close()
    try:
        found: dict[str, str] = ours.recv()
    except EOFError:
        process.join()
        end = "took too long" if process.exitcode == -signal.SIGALRM else "ended the process"
        found = dict.fromkeys(OPERATIONS, f"fault: {end}")
    process.join()
    print(kind, {k: v for k, v in found.items() if v != WORKS}, flush=True)
    return found


def try_real(name: str) -> dict[str, str]:
    """A real model, which is loaded anew for every operation."""
    label = Path(name).stem
    found = tried(lambda: tappa.load(name, device="cpu"))
    return {"class": type(tappa.load(name, device="cpu").model).__name__, "label": label, **found}


def table(rows: dict[str, dict[str, str]]) -> list[str]:
    """A line for each model; what is refused or at fault stands below, under its number."""
    notes: dict[str, int] = {}

    def cell(text: str) -> str:
        if text == WORKS:
            return text
        kind, _, why = text.partition(": ")
        number = notes.setdefault(why, len(notes) + 1)
        return f"{'**fault**' if kind == 'fault' else kind} [{number}]"

    lines = ["| | class | " + " | ".join(OPERATIONS) + " |", "|---" * (len(OPERATIONS) + 2) + "|"]
    for kind, row in rows.items():
        cells = [cell(row[name]) for name in OPERATIONS]
        lines.append(f"| {row.get('label', kind)} | {row['class']} | " + " | ".join(cells) + " |")
    return [*lines, "", *(f"{number}. {why}" for why, number in notes.items())]


def page(rows: dict[str, dict[str, str]], real: dict[str, dict[str, str]]) -> str:
    """docs/models.md."""
    tiny_rows = {kind: row for kind, row in rows.items() if "class" in row}
    without = [kind for kind, row in rows.items() if "no RoPE" in row]
    unbuilt = [f"{kind} ({row['no model']})" for kind, row in rows.items() if "no model" in row]
    faults = sum(v.startswith("fault") for row in tiny_rows.values() for v in row.values())
    return "\n".join(
        [
            "# Models",
            "",
            "What works on which architecture. `python runs/models_table.py` writes this page "
            "anew, in some minutes on two cores.",
            "",
            f"transformers {version('transformers')}, torch {version('torch')}: of {len(rows)} "
            f"causal architectures {len(tiny_rows)} have RoPE and could be tried, {len(without)} "
            f"have none, {len(unbuilt)} could not be built; {faults} faults.",
            "",
            "*yes*: it runs, and the result is right. *analyze*: attention as the model's own, no "
            "bound violated, the file read back and merged, the same in chunks. *compress*: "
            f"{BUDGET} of {TOKENS} tokens stay while text is written, and a budget for all changes "
            "no logits. *prune*: saved and loaded by plain transformers it computes the same. "
            "*verify*: claims on bounds, relocation, base and sensitivity; *partly* where some "
            "cannot be tested. *refused*: an error of one line that says why. **fault**: anything "
            "else.",
            "",
            "## Real models",
            "",
            *table(real),
            "",
            "## Tiny random models of every architecture",
            "",
            *table(tiny_rows),
            "",
            "## Without RoPE",
            "",
            "Refused in one line, by every command: " + ", ".join(without) + ".",
            "",
            "## Not built",
            "",
            "No tiny model came of the sizes in `runs/tiny_models.py`: " + "; ".join(unbuilt) + ".",
            "",
        ]
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--only", default="")
    options.add_argument("--real", nargs="*", default=[])
    options.add_argument("--jobs", type=int, default=2)
    chosen = options.parse_args()
    sys.path.append(str(ROOT / "tests"))
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    real = json.loads(REAL.read_text(encoding="utf-8")) if REAL.is_file() else {}
    for name in chosen.real:
        real[Path(name).stem] = try_real(name)
        REAL.write_text(json.dumps(real, indent=1) + "\n", encoding="utf-8")
    torch.set_num_threads(1)  # forks inherit it, and would wait for the threads of this process
    kinds = chosen.only.split(",") if chosen.only else sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    start = time.monotonic()
    with ThreadPoolExecutor(chosen.jobs) as pool:
        rows = dict(zip(kinds, pool.map(in_process, kinds), strict=True))
    if chosen.only:
        print("\n".join(table({kind: row for kind, row in rows.items() if "class" in row})))
        return
    PAGE.write_text(page(rows, real), encoding="utf-8")
    print(f"wrote {PAGE} after {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
