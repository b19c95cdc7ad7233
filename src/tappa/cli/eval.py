"""`tappa eval` and `tappa lm-eval`."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from tappa import cluster
from tappa.cli.common import (
    CpusOption,
    DeviceOption,
    DryRunOption,
    DtypeOption,
    GpusOption,
    ModelArgument,
    RayAddressOption,
    TrustOption,
    WorkersOption,
    extra,
    messages,
    parts,
    say,
)
from tappa.compression import parse_budget, split_methods
from tappa.errors import EvaluationError
from tappa.files import check_writable_folder


def evaluate_methods(
    model: ModelArgument = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Names of 'tappa methods', with options as cake(gamma=50). Default: full, "
            "streaming_llm, h2o, snapkv, pyramidkv, cake, tappa_paper, tappa."
        ),
    ] = None,
    budgets: Annotated[
        str, typer.Option(help="Tokens per layer and head, or shares of the prompt.")
    ] = "128,256,512,1024",
    tasks: Annotated[
        str,
        typer.Option(
            help="fidelity, perplexity, ruler, longbench, local, choice; a task of them "
            "(ruler_vt); or any task of lm-eval."
        ),
    ] = "fidelity",
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of texts (*.txt) and of LongBench's files (<task>.jsonl)."),
    ] = None,
    include: Annotated[
        Path | None,
        typer.Option(
            *("--include-path", "--include_path"),
            help="Folder of lm-eval task files (NAME.yaml) of your own, for --tasks.",
        ),
    ] = None,
    lengths: Annotated[str, typer.Option(help="Tokens of prompts, where a task can choose.")] = (
        "4096"
    ),
    limit: Annotated[int, typer.Option(min=1, help="Samples of each task.")] = 50,
    seed: Annotated[int, typer.Option(help="Of samples and of resampling.")] = 0,
    half: Annotated[
        str | None, typer.Option(help="tune or report: samples of even or of odd number.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Method to compare with. Default: cake, or the first.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Use the model's chat template.")] = False,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for answers and tables; may have some.")
    ] = Path("results"),
    shard: Annotated[
        str, typer.Option(help="k/n: every n-th batch; n processes may share a folder.")
    ] = "0/1",
    batch: Annotated[
        int | None,
        typer.Option(
            min=1, help="Samples answered together, if they fit. Default: 4 on a GPU, or 1."
        ),
    ] = None,
    workers: WorkersOption = 1,
    ray_address: RayAddressOption = None,
    gpus_per_worker: GpusOption = None,
    cpus_per_worker: CpusOption = 1,
    dry_run: DryRunOption = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustOption = False,
) -> None:
    """Compare compression methods: methods x budgets x tasks, with intervals and tests.

    Every prompt is read once for all methods and budgets. A folder that has answers keeps them
    and gets those that are missing. Needs the extra tappa[eval].

    Examples:

    \b
      tappa eval --limit 10 --lengths 2048
      tappa eval --limit 50 --lengths 2048 --budgets 64,128,256,512,1024
      tappa eval model.gguf --tasks ruler,local --budgets 128,512 -o results
      tappa eval model.gguf --methods "full,cake,tappa,tappa(gamma=0)" --data essays
      tappa eval ./my-model --tasks longbench --data LongBench/data --chat
      tappa eval ./my-model --tasks capitals --include-path my-tasks  # my-tasks/capitals.yaml
      tappa eval ./my-model --tasks ruler --workers 8 --ray-address auto --dry-run
    """
    kit = _evaluation()
    tokens = tuple(_whole(part, "a length") for part in parts(lengths))
    wanted = kit.Evaluation(
        methods=kit.METHODS if methods is None else split_methods(methods),
        budgets=[parse_budget(part) for part in parts(budgets)],
        tasks=parts(tasks),
        source=kit.Source(limit, tokens, seed, data, chat, include),
        baseline=baseline,
        half=half,
    )
    wanted.cells()
    kit.check_names(wanted.tasks, data, include)
    part = _shard(shard)
    placement = cluster.Placement(workers, ray_address, gpus_per_worker, cpus_per_worker)
    if dry_run:
        print(cluster.estimate_grid(model, wanted, out, placement))
        return
    check_writable_folder(out)
    source = cluster.ModelSource(model, device, dtype, trust_remote_code)
    many = extra("tappa.cluster.evaluate", "eval")
    errors = messages()
    with (
        cluster.open_pool(source, placement, errors) as pool,
        cluster.following(errors, "evaluating", "samples") as follow,
    ):
        results = many.evaluate_grid(
            *(pool, wanted, out),
            name="SmolLM2-135M-Instruct" if model is None else model,
            shard=part,
            batch=batch,
            follow=follow,
            say=lambda text: say(errors, text),
        )
    print(results.markdown)
    print(kit.describe_outcome(results.outcome))
    print(f"wrote {out / 'tables.md'}, results.json and samples.parquet")
    if results.outcome.left:
        raise KeyboardInterrupt


def lm_eval(context: typer.Context) -> None:
    """lm-evaluation-harness's own command line, which knows the model type "tappa".

    Example:

    \b
      tappa lm-eval --model tappa --model_args pretrained=M,method=tappa,budget=512 --tasks ...
    """
    _evaluation()
    from tappa.evaluation.harness import lm_eval_main

    lm_eval_main(context.args)


def _evaluation() -> Any:
    """The evaluation, whose libraries are an extra."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return extra("tappa.evaluation.evaluate", "eval")


def _whole(text: str, what: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise EvaluationError(f"expected {what} as a whole number above 0, got {text!r}")
    return value


def _shard(text: str) -> tuple[int, int]:
    """`2/8` -> (2, 8)."""
    number, _, total = text.partition("/")
    if not (number.isdigit() and total.isdigit() and int(number) < int(total)):
        raise EvaluationError(f"expected a shard k/n with 0 <= k < n, such as 0/4, got {text!r}")
    return int(number), int(total)
