"""Several GPUs: what layers on all of them, heads split over them and workers with one each give
and cost, against one GPU.

    python benchmarks/gpu/several.py --out OUT --part equal,commands     # about 7 minutes
    python benchmarks/gpu/several.py --out OUT --part speed              # about 7 minutes
    python benchmarks/gpu/several.py --out OUT --part large              # a 70B shape
    python benchmarks/gpu/several.py table OUT/several.jsonl             # for RESULTS.md
    python benchmarks/gpu/several.py --out OUT --tiny                    # two processes on a CPU

Every measurement is a process of its own with a time limit. `OUT/several.jsonl` gets its lines, and
`OUT/several.log` the ends of what failed.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# largest difference: of sums and logits as a share of the largest one; of nll; of what is kept
TOLERANCES = {"analysis": 2e-3, "calibration": 2e-3, "logits": 2e-2, "nll": 1e-2, "kept": 0.02}


class Runner:
    """Runs one process after the other, and keeps what they print."""

    def __init__(self, out: Path, tiny: bool, seconds: float) -> None:
        self.out, self.tiny, self.end = out, tiny, time.monotonic() + seconds
        self.count = 2 if tiny else torch.cuda.device_count()
        self.shape = "tiny" if tiny else "small"
        self.scratch = Path(tempfile.mkdtemp(prefix="several-"))

    def say(self, **line: Any) -> None:
        with (self.out / "several.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line)[:400], flush=True)

    def job(self, part: str, what: str, how: str, limit: int, *more: Any) -> None:
        """`several_job.py`, under torchrun where heads are split."""
        small = ["--tokens", 400, "--prompt", 200, "--new", 40] if self.tiny else []
        command = [HERE / "several_job.py", what, "--how", how, *small, *more]
        self.run(part, f"{what} {how}", command, limit, heads=how == "heads")

    def run(self, part: str, name: str, command: list[Any], limit: int, heads: bool) -> None:
        """Lines of JSON go to the file; so does how it ended, if not well."""
        launch = [sys.executable]
        if heads:
            launch += ["-m", "torch.distributed.run", "--standalone"]
            launch += ["--nproc-per-node", str(self.count)]
        left = self.end - time.monotonic()
        if left < 15:
            self.say(part=part, name=name, error="no time left")
            return
        # as a user would run it: with the GPUs' own order of work
        env = {k: v for k, v in os.environ.items() if k != "CUDA_LAUNCH_BLOCKING"}
        path = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
        env |= {"PYTHONPATH": os.pathsep.join(p for p in path if p), "TOKENIZERS_PARALLELISM": "0"}
        if self.tiny:
            env["OMP_NUM_THREADS"] = "1"
        start = time.monotonic()
        arguments = [*launch, *map(str, command)]
        code, out, error = finish(arguments, env, min(limit, left))
        for line in out.splitlines():
            if line.startswith("{") and name.split()[0] != "tappa":
                self.say(part=part, name=name, **json.loads(line))
        seconds = round(time.monotonic() - start, 1)
        self.say(
            part=part,
            name=name,
            code=code,
            seconds=seconds,
            said=out[-600:] if "generate" in name else "",
        )
        with (self.out / "several.log").open("a") as file:
            file.write(f"==== {name}: {code}, {seconds} s\n{error[-6000 if code else -3000 :]}\n")


def finish(arguments: list[str], env: dict[str, str], limit: float) -> tuple[int | str, str, str]:
    """Exit code (or "timeout"), stdout and stderr; at the limit all that it started is ended."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(arguments, env=env, start_new_session=True, **pipes) as process:
        try:
            out, error = process.communicate(timeout=limit)
            return process.returncode, out, error
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, error = process.communicate()
            return "timeout", out, error


# ---- parts


def equal(run: Runner) -> None:
    """Four layers of the 8B shape in float32: all figures, three times in a process."""
    folder = run.scratch / "small"
    run.job("equal", "make", "one", 120, "--folder", folder, "--shape", run.shape)
    where = ["--folder", folder, "--out", run.scratch]
    for how in ("one", "layers", "heads"):
        run.job("equal", "figures", how, 150, *where)
        compare(run, how)
    if importlib.util.find_spec("ray"):
        run.job("equal", "workers", "workers", 150, *where)
        compare(run, "workers")
    else:
        run.say(part="equal", name="workers", error="Ray is not installed")


def compare(run: Runner, how: str) -> None:
    """The figures of one way against those of one GPU."""
    files = sorted(run.scratch.glob(f"figures-{how}-*.npz"))
    reference = run.scratch / "figures-one-0.npz"
    if how == "one" or not files or not reference.exists():
        return
    mine: dict[str, np.ndarray] = {}
    for file in reversed(files):  # those of the first rank last; heads are in the file of theirs
        mine |= dict(np.load(file))
    theirs = dict(np.load(reference))
    worst: dict[str, tuple[float, str]] = {}
    for name, value in theirs.items():
        kind = name.split("/")[0]
        if name in mine and kind != "text":
            worst[kind] = max(worst.get(kind, (0.0, "")), (distance(kind, mine[name], value), name))
    if "text/tappa" in mine:
        same = mine["text/tappa"] == theirs["text/tappa"]
        first = int(same.argmin()) if not same.all() else len(same)
        run.say(part="equal", how=how, what="greedy text", alike_until=first, of=len(same))
    missing = [name for name in theirs if name not in mine] if how != "workers" else []
    for kind, (most, name) in worst.items():
        fine = most <= TOLERANCES[kind]
        run.say(part="equal", how=how, what=kind, difference=most, at=name, within=bool(fine))
    run.say(part="equal", how=how, what="missing", names=missing[:9])


def distance(kind: str, mine: np.ndarray, theirs: np.ndarray) -> float:
    """0 for the same: see TOLERANCES."""
    if kind == "kept":
        common = len(np.intersect1d(mine, theirs))
        return 1 - common / max(len(mine), len(theirs), 1)
    if mine.shape != theirs.shape:
        return float("inf")
    size = 1.0 if kind == "nll" else max(float(np.abs(theirs).max()), 1e-30)
    return float(np.abs(mine.astype(float) - theirs).max()) / size


def commands(run: Runner) -> None:
    """As they are typed."""
    folder = run.scratch / "small"
    if not folder.exists():
        run.job("commands", "make", "one", 120, "--folder", folder, "--shape", run.shape)
    text = run.scratch / "text.txt"
    text.write_text((ROOT / "README.md").read_text()[:3000])
    tokens = [] if not run.tiny else ["--tokens", 300]
    for device, heads in (("all", False), ("auto", True)):
        what = ["--device", device]
        name = "heads" if heads else "layers"
        write = ["--prompt-file", text, "--budget", 256, "--max-new-tokens", 96, *what]
        out = ["--text", text, *tokens, "--out", run.scratch / f"out-{name}", "--json", *what]
        for number in range(1 if heads else 3):
            command = ["-m", "tappa", "analyze", folder, *out]
            run.run("commands", f"tappa analyze {name} {number}", command, 90, heads)
        command = ["-m", "tappa", "generate", folder, *write]
        run.run("commands", f"tappa generate {name}", command, 90, heads)


def speed(run: Runner) -> None:
    """The 8B shape in bfloat16."""
    folder, shape = run.scratch / "8b", "tiny" if run.tiny else "8b"
    sizes = [] if run.tiny else ["--tokens", 4096, "--prompt", 8192]
    run.job("speed", "make", "one", 150, "--folder", folder, "--shape", shape)
    for how in ("one", "layers", "heads"):
        run.job("speed", "speed", how, 170, "--folder", folder, *sizes)


def large(run: Runner) -> None:
    """The 70B shape, layers on all GPUs."""
    shape = "tiny" if run.tiny else "70b"
    sizes = [] if run.tiny else ["--tokens", 2048, "--chunk", 1024, "--prompt", 4096]
    run.job("large", "large", "layers", 400, "--shape", shape, *sizes)


# ---- the table


def table(file: Path) -> str:
    """Markdown, from the lines of a run."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    out = ["| against one GPU | largest difference | within |", "|---|---|---|"]
    for line in lines:
        if "difference" in line:
            what = f"{line['how']}: {line['what']}"
            out.append(
                f"| {what} | {line['difference']:.2g} | {'yes' if line['within'] else 'NO'} |"
            )
        elif "alike_until" in line:
            out.append(f"| {line['how']}: greedy text | {line['alike_until']} of {line['of']} |  |")
        elif line.get("differ_from_first"):
            out.append(f"| {line['how']}: time {line['time']} differs from the first | | NO |")
    out += ["", "| 8B and 70B shapes | way | figure | peak GB of each GPU |", "|---|---|---|---|"]
    for line in lines:
        if "peak_gb" in line:
            unit = "seconds" if "seconds" in line else "per_s"
            named = "s" if unit == "seconds" else "tokens/s"
            what = line["what"] + (f", {line['tokens']} tokens" if "tokens" in line else "")
            peaks = ", ".join(map(str, line["peak_gb"]))
            out.append(
                f"| {line['part']}: {what} | {line['how']} | {line[unit]} {named} | {peaks} |"
            )
    failed = [line for line in lines if line.get("code", 0) != 0 or "error" in line]
    return "\n".join([*out, "", *(f"FAILED {json.dumps(line)[:300]}" for line in failed)])


def main() -> None:
    if sys.argv[1:2] == ["table"]:
        print(table(Path(sys.argv[2])))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", default="equal,commands,speed,large")
    parser.add_argument("--tiny", action="store_true", help="two processes on a CPU")
    parser.add_argument("--seconds", type=float, default=530, help="nothing is started after these")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    run = Runner(asked.out, asked.tiny, asked.seconds)
    gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    from importlib.metadata import version

    packages = {name: version(name) for name in ("torch", "transformers", "accelerate")}
    run.say(part="machine", gpus=gpus, date=time.strftime("%Y-%m-%d"), **packages)
    parts = {"equal": equal, "commands": commands, "speed": speed, "large": large}
    for name in asked.part.split(","):
        parts[name](run)


if __name__ == "__main__":
    main()
