"""The command line: parse, call, print."""

import importlib
import io
import json
import os
import sys
import warnings
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import tappa
from tappa import cluster, pruning
from tappa.cluster.options import CpusOption, GpusOption, RayAddressOption, WorkersOption
from tappa.compression import (
    check_method,
    describe_methods,
    parse_budget,
    split_methods,
    write_on,
)
from tappa.display import render_methods, render_plan, render_written, show
from tappa.errors import EvaluationError, MissingExtraError, PruningError, TappaError, TextError
from tappa.files import check_writable_folder, ensure_folder, write_atomic
from tappa.report.content import content_of
from tappa.report.looking import TEXTS
from tappa.report.page import render, write_report
from tappa.report.prints import figures
from tappa.report.views import FILE, save_views
from tappa.texts import packaged_halves, packaged_prompt, packaged_text, read_text

ModelArgument = Annotated[
    str | None,
    typer.Argument(help="Hub id, folder or .gguf file; the packaged SmolLM2-135M if left out."),
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
DtypeOption = Annotated[str, typer.Option(help="auto, float32, float64, bfloat16 or float16.")]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
]

FEW_NOTES = 3  # on what files lack: more of them are counted only

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)


def _version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"tappa {tappa.__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Why attention heads do what they do, by how self-similar their queries are over time."""


@app.command()
def analyze(
    model: ModelArgument = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="UTF-8 text file, one prompt; may be repeated. Default: packaged prose."),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of each text. Default: 2048, or the model's context if less."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for analysis.json, heads.csv and report.html.")
    ] = None,
    report: Annotated[
        bool, typer.Option("--report/--no-report", help="Write report.html into the folder too.")
    ] = True,
    shown: Annotated[
        int, typer.Option("--shown-texts", min=1, help="Texts whose maps the report shows.")
    ] = TEXTS,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    chunk: Annotated[
        int | None, typer.Option(min=8, help="Prefill in pieces of this many tokens.")
    ] = None,
    workers: WorkersOption = 1,
    ray_address: RayAddressOption = None,
    gpus_per_worker: GpusOption = None,
    cpus_per_worker: CpusOption = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what there is to do and its cost; do nothing.")
    ] = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Analyse every attention head of a RoPE language model.

    Examples:

    \b
      tappa analyze
      tappa analyze model.gguf --text notes.txt --tokens 4096 --out results
      tappa analyze model.gguf --text a.txt --text b.txt --workers 2 --out results
      tappa analyze ./my-model --json | jq '.agreement'
    """
    texts = [read_text(path) for path in text] if text else [packaged_text()]
    titles = [path.name for path in text] if text else ["Pride and Prejudice"]
    if out is not None:
        check_writable_folder(out)
    errors = Console(stderr=True)
    source = cluster.ModelSource(model, device, dtype, trust_remote_code)
    placement = cluster.Placement(workers, ray_address, gpus_per_worker, cpus_per_worker)
    if dry_run:
        print(cluster.estimate_analysis(model, texts, tokens, placement))
        return
    with cluster.open_pool(source, placement, errors) as pool:
        with cluster.following(errors, "analysing", "steps") as follow:
            analysis = cluster.analyze_texts(
                *(pool, texts),
                tokens=tokens,
                chunk=chunk,
                folder=cluster.state_folder(out, placement),
                follow=follow,
            )
        written = []
        if out is not None:
            ensure_folder(out)
            written = [analysis.save(out / "analysis.json")]
            table = analysis.to_frame().to_csv(index=False)
            written.append(write_atomic(out / "heads.csv", table))
        if out is not None and report:
            with errors.status("drawing the report"):
                chosen = list(zip(titles, texts, strict=True))[:shown]
                views = [cluster.look_at(pool, content, title, tokens) for title, content in chosen]
                written.append(save_views(out / FILE, views))
                try:
                    written.append(write_report(out / "report.html", [out / "analysis.json"]))
                except MissingExtraError as error:
                    warnings.warn(str(error), stacklevel=1)
    if as_json:
        print(json.dumps(analysis.summary(), allow_nan=False))
        return
    show(analysis, Console())
    if written:
        typer.echo(f"\nwrote {', '.join(map(str, written))}")


@app.command("report")
def report_command(
    analyses: Annotated[
        list[Path], typer.Argument(help="analysis.json of 'tappa analyze --out'; several compare.")
    ],
    results: Annotated[
        Path | None, typer.Option(help="Folder in which eval, prune and verify left their files.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write.")] = Path(
        "report.html"
    ),
) -> None:
    """One page of all heads: atlas, head cards, text, results; opens without a network.

    Attention maps and texts come from views.npz beside each analysis. Needs the extra
    tappa[report].

    Examples:

    \b
      tappa analyze --out smollm2 && tappa report smollm2/analysis.json
      tappa report before/analysis.json after/analysis.json --results results -o both.html
    """
    check_writable_folder(out.absolute().parent)
    content = content_of(analyses, results)
    write_atomic(out, render(content))
    _warn(content["notes"])
    typer.echo(f"wrote {out}")


def _warn(notes: list[str]) -> None:
    """What is missing in files, on stderr: the notes themselves if they are few."""
    for note in notes if len(notes) <= FEW_NOTES else []:
        typer.echo(f"note: {note}", err=True)
    if len(notes) > FEW_NOTES:
        typer.echo(f"{len(notes)} notes on what is missing: see the top of the page", err=True)


@app.command("figures")
def figures_command(
    analysis: Annotated[Path, typer.Argument(help="analysis.json of 'tappa analyze --out'.")],
    results: Annotated[
        Path | None, typer.Option(help="Folder in which 'tappa eval' left its results.json.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the pictures.")] = Path(
        "figures"
    ),
    kind: Annotated[str, typer.Option("--format", help="png, svg or pdf.")] = "png",
) -> None:
    """Draw figures for a paper: atlas, similarity, channels, patterns, quality against budget.

    Needs the extra tappa[figures].

    Examples:

    \b
      tappa figures smollm2/analysis.json -o figures
      tappa figures smollm2/analysis.json --results results --format pdf
    """
    content = content_of([analysis], results)
    pictures = figures(content, kind)
    ensure_folder(out)
    for name, picture in pictures.items():
        typer.echo(f"wrote {write_atomic(out / name, picture)}")
    for note in content["notes"]:
        typer.echo(f"note: {note}", err=True)


@app.command()
def generate(
    model: ModelArgument = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="UTF-8 text file to continue. Default: packaged prose.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    method: Annotated[
        str, typer.Option(help="A name of 'tappa methods', or two as a+b.")
    ] = "tappa",
    budget: Annotated[
        str, typer.Option(help="Tokens per layer and head, or a share of the prompt such as 0.1.")
    ] = "512",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = 200,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")
    ] = False,
    analysis: Annotated[
        Path | None, typer.Option(help="Take budgets from this analysis.json, not the prompt.")
    ] = None,
    every: Annotated[int, typer.Option(min=1, help="Drop tokens every so many steps.")] = 16,
    compiled: Annotated[
        bool, typer.Option("--compile", help="On a GPU: steps by torch.compile. A minute at first.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustOption = False,
) -> None:
    """Continue a prompt with a compressed KV cache; tell memory and time.

    Examples:

    \b
      tappa generate --prompt-file report.txt --budget 256
      tappa generate model.gguf --prompt-file q.txt --chat --method snapkv --budget 0.1
      tappa generate --method full
    """
    if prompt is not None and prompt_file is not None:
        raise TextError("expected --prompt or --prompt-file, got both")
    text = packaged_prompt() if prompt is None else prompt
    text = text if prompt_file is None else read_text(prompt_file)
    wanted = parse_budget(budget)
    check_method(method, wanted)
    errors = Console(stderr=True)
    with errors.status("loading the model"):
        loaded = tappa.load(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    cache = tappa.compressed(loaded.model, method, wanted, analysis=analysis, every=every)
    written = write_on(
        *(cache, loaded.tokenizer, text, max_new_tokens),
        chat=chat,
        show=None if as_json else _print_piece,
        compiled=compiled,
    )
    if as_json:
        print(json.dumps({"method": method, "budget": cache.budget} | asdict(written)))
        return
    Console().print(render_written(written, method))


@app.command("eval")
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
        Path, typer.Option("--out", "-o", help="Folder for answers and tables; resumed if there.")
    ] = Path("results"),
    shard: Annotated[
        str, typer.Option(help="k/n: every n-th batch; n processes may share a folder.")
    ] = "0/1",
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Samples answered together. Default: 4 on a GPU, otherwise 1."),
    ] = None,
    workers: WorkersOption = 1,
    ray_address: RayAddressOption = None,
    gpus_per_worker: GpusOption = None,
    cpus_per_worker: CpusOption = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what there is to do and its cost; do nothing.")
    ] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustOption = False,
) -> None:
    """Compare compression methods: methods x budgets x tasks, with intervals and tests.

    Every prompt is read once for all methods and budgets. Needs the extra tappa[eval].

    Examples:

    \b
      tappa eval --limit 10 --lengths 2048
      tappa eval model.gguf --tasks ruler,local --budgets 128,512 -o results
      tappa eval model.gguf --methods "full,cake,tappa,tappa(gamma=0)" --data essays
      tappa eval ./my-model --tasks longbench --data LongBench/data --chat
      tappa eval ./my-model --tasks ruler --workers 8 --ray-address auto --dry-run
    """
    kit = _evaluation()
    wanted = kit.Evaluation(
        methods=kit.METHODS if methods is None else split_methods(methods),
        budgets=[parse_budget(part) for part in _parts(budgets)],
        tasks=_parts(tasks),
        source=kit.Source(
            limit=limit,
            lengths=tuple(_whole(part, "a length") for part in _parts(lengths)),
            seed=seed,
            data=data,
            chat=chat,
        ),
        baseline=baseline,
        half=half,
    )
    wanted.cells()
    kit.check_names(wanted.tasks, data)
    part = _shard(shard)
    placement = cluster.Placement(workers, ray_address, gpus_per_worker, cpus_per_worker)
    if dry_run:
        print(cluster.estimate_grid(model, wanted, out, placement))
        return
    check_writable_folder(out)
    source = cluster.ModelSource(model, device, dtype, trust_remote_code)
    many = _extra("tappa.cluster.evaluate", "eval")
    errors = Console(stderr=True)
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
        )
    print(results.markdown)
    print(kit.describe_outcome(results.outcome))
    print(f"wrote {out / 'tables.md'}, results.json and samples.parquet")
    if results.outcome.left:
        raise KeyboardInterrupt


@app.command(
    "lm-eval",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def lm_eval_command(context: typer.Context) -> None:
    """lm-evaluation-harness's own command line, which knows the model type "tappa".

    Example:

    \b
      tappa lm-eval --model tappa --model_args pretrained=M,method=tappa,budget=512 --tasks ...
    """
    _evaluation()
    from tappa.evaluation.harness import lm_eval_main

    lm_eval_main(context.args)


@app.command()
def prune(
    model: ModelArgument = None,
    layers: Annotated[int, typer.Option(help="Layers to remove.")] = 0,
    order: Annotated[
        str,
        typer.Option(help="bi_prime, bi, q_similarity, uniform, random, reverse or greedy."),
    ] = "bi_prime",
    beta: Annotated[float, typer.Option(help="Weight of 1 - q-similarity in bi_prime.")] = 0.3,
    query_heads: Annotated[
        int, typer.Option(help="Query heads of the whole model to silence: no smaller, no faster.")
    ] = 0,
    kv_groups: Annotated[
        int, typer.Option(help="KV heads of every layer to slice out, with their query heads.")
    ] = 0,
    importance: Annotated[
        str, typer.Option(help="Of heads: output (norm), dissimilarity (1 - S), or mix.")
    ] = "output",
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Calibration text; may be repeated. Default: half of the packaged one."),
    ] = None,
    held_out: Annotated[
        Path | None,
        typer.Option(help="Text for perplexity. Default: the other half of the packaged one."),
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens of a window.")] = 1024,
    stride: Annotated[int, typer.Option(help="Tokens from one window's start to the next.")] = 256,
    windows: Annotated[
        int,
        typer.Option(
            min=1, help="At most so many windows of each text, evenly spread: fewer are faster."
        ),
    ] = 32,
    calibration: Annotated[
        Path | None,
        typer.Option(help="File of the calibration: written, resumed, and used if complete."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the order random.")] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the checkpoint.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Picture of BI, q-similarity and BI' (.png, .svg, .pdf).")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print order and scores; remove nothing.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the checkpoint in the output folder.")
    ] = False,
    workers: WorkersOption = 1,
    ray_address: RayAddressOption = None,
    gpus_per_worker: GpusOption = None,
    cpus_per_worker: CpusOption = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustOption = False,
) -> None:
    """Remove layers or heads, and save a checkpoint that plain transformers loads.

    Examples:

    \b
      tappa prune --layers 9 --dry-run
      tappa prune model.gguf --layers 6 --beta 0.3 --out smaller
      tappa prune ./my-model --layers 4 --order greedy --windows 4 --out smaller
      tappa prune ./my-model --kv-groups 1 --importance dissimilarity --out smaller
    """
    kit = pruning
    wanted = kit.Amounts(
        *(layers, query_heads, kv_groups, order, beta, seed),
        importance=importance,  # type: ignore[arg-type]  # checked below
    )
    if not dry_run and out is None:
        raise PruningError("expected --out FOLDER for the checkpoint, or --dry-run")
    if out is not None and not dry_run:
        kit.check_target(out, force=force, source=model)
    kind = kit.check_plot(plot) if plot is not None else ""
    first, second = packaged_halves()
    known = [read_text(path) for path in text] if text else [first]
    held = second if held_out is None else read_text(held_out)
    errors = Console(stderr=True)
    source = cluster.ModelSource(model, device, dtype, trust_remote_code)
    placement = cluster.Placement(workers, ray_address, gpus_per_worker, cpus_per_worker)
    with errors.status("loading the model"):
        loaded = cluster.for_this_process(source, placement).load()
    wanted.check(loaded.model)
    cut = {"window": window, "limit": windows}
    windows_of = partial(kit.Windows.of, loaded.model, loaded.tokenizer)
    calibration_windows = windows_of(known, stride=stride, **cut)
    held_windows = windows_of(held, stride=window, **cut)
    with cluster.following(errors, "calibrating", "pieces") as follow:
        found = cluster.calibrate_windows(
            *(source, placement, loaded.model, calibration_windows),
            state=calibration,
            console=errors,
            follow=follow,
        )
    with _progress(errors, "choosing", "measured") as bar:
        task = bar.add_task("measured", total=None)
        chosen = kit.plan(
            *(loaded.model, found, wanted, calibration_windows),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if plot is not None:
        write_atomic(plot, kit.plot(found, chosen, kind))
        errors.print(f"wrote {plot}", highlight=False, markup=False)
    if dry_run:
        print(kit.as_json(found, chosen) if as_json else render_plan(found, chosen))
        return
    assert out is not None
    with _progress(errors, "measuring", "windows") as bar:
        task = bar.add_task("windows", total=None)

        def update(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        before = kit.measure(loaded.model, held_windows, progress=update)
        kit.apply(loaded.model, chosen)
        after = kit.measure(loaded.model, held_windows, progress=update)
    texts = {
        "calibration": ", ".join(p.name for p in text or []) or "first half of the packaged text",
        "held_out": held_out.name if held_out else "second half of the packaged text",
    }
    content = kit.as_json(found, chosen, (before, after), texts)
    files: dict[str, str | bytes] = {
        "README.md": kit.model_card(found, chosen, (before, after), texts),
        "pruning.json": content,
    }
    kit.save_checkpoint(loaded.model, loaded.tokenizer, out, files=files, force=force)
    if as_json:
        print(content)
        return
    print(render_plan(found, chosen))
    print(kit.figures_table(before, after))
    print(f"wrote {out}: a checkpoint for AutoModelForCausalLM, README.md and pruning.json")


@app.command()
def verify(
    model: ModelArgument = None,
    claims: Annotated[
        str | None,
        typer.Option(
            help="bounds, relocation, base, constructed, observations, seasons, sensitivity. "
            "Default: all."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 512,
    head: Annotated[
        list[str] | None,
        typer.Option(help="Head to relocate, as 18.5 (layer.head); may be repeated."),
    ] = None,
    heads: Annotated[int, typer.Option(help="Heads to relocate where none is named.")] = 6,
    targets: Annotated[str, typer.Option(help="Channels to which they are moved.")] = "2,3,5",
    prompts: Annotated[int, typer.Option(help="Prompts of the sensitivity.")] = 2,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Kind of text, a UTF-8 file; may be repeated. Default: five kinds."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for verification.json and figures.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustOption = False,
) -> None:
    """Check the paper's claims on a model: predicted, measured, error, pass or fail.

    Ends with code 1 when a bound is violated or a relocation is off by more than 1%. Needs the
    extra tappa[verify].

    Examples:

    \b
      tappa verify
      tappa verify model.gguf --claims bounds,relocation --tokens 1024 --out results
      tappa verify ./my-model --claims relocation --head 18.5 --targets 2,3,5,7
    """
    kit = _extra("tappa.verification.verify", "verify")
    wanted = kit.Verification(
        claims=kit.CLAIMS if claims is None else _parts(claims),
        tokens=tokens,
        heads=[kit.parse_head(part) for part in head or []],
        count=heads,
        targets=[kit.parse_channel(part) for part in _parts(targets)],
        prompts=prompts,
    )
    wanted.check()
    texts = {path.stem: read_text(path) for path in text} if text else None
    if out is not None:
        check_writable_folder(out)
    errors = Console(stderr=True)
    with errors.status("loading the model"):
        loaded = tappa.load(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    with _progress(errors, "verifying", "steps") as bar:
        task = bar.add_task("steps", total=None)
        found = kit.verify(
            *(loaded.model, loaded.tokenizer, wanted),
            texts=texts,
            progress=lambda claim, done, total: bar.update(task, completed=done, total=total),
        )
    if out is not None:
        ensure_folder(out)
        write_atomic(out / "verification.json", found.to_json())
        for name, picture in kit.figures(found).items():
            write_atomic(out / name, picture)
    if as_json:
        print(found.to_json())
    else:
        print(kit.to_markdown(found))
        if out is not None:
            print(f"wrote {out / 'verification.json'} and figures")
    if not found.passed:
        raise typer.Exit(1)


@app.command()
def methods(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """List the methods of KV cache compression, with one line and the source of each.

    Any scorer combines with any budget rule: --method expected_attention+tappa.
    """
    if as_json:
        print(json.dumps(describe_methods()))
        return
    Console().print(render_methods(describe_methods()))


def _evaluation() -> Any:
    """The evaluation, whose libraries are an extra."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return _extra("tappa.evaluation.evaluate", "eval")


def _extra(module: str, name: str) -> Any:
    """A module whose libraries are an extra of this name."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if error.name is not None and error.name.split(".")[0] == "tappa":
            raise
        raise MissingExtraError(
            f"{error.name} is missing: this needs the extra, pip install 'tappa[{name}]'"
        ) from error


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


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
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and int(part) < int(parts)):
        raise EvaluationError(f"expected a shard k/n with 0 <= k < n, such as 0/4, got {text!r}")
    return int(part), int(parts)


def _print_piece(text: str) -> None:
    print(text, end="", flush=True)


def _progress(console: Console, doing: str = "analysing", what: str = "layers") -> Progress:
    """A bar on stderr, gone when it is done."""
    columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn(), TextColumn(what))
    off = not console.is_terminal  # else a stray empty line is printed
    left = TimeRemainingColumn()
    return Progress(*columns, left, console=console, transient=True, disable=off)


_INTERRUPTED = 130


def main() -> None:
    """Entry point: errors that a user can put right become one line and exit code 2."""
    for stream in (sys.stdout, sys.stderr):  # a terminal without Greek letters is no reason to fail
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    warnings.showwarning = _print_warning
    try:
        code = app(standalone_mode=False)
        if code == _INTERRUPTED:  # what Typer makes of a KeyboardInterrupt
            raise KeyboardInterrupt
        sys.stdout.flush()
    except TappaError as error:
        _fail(str(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", _INTERRUPTED)
    except BrokenPipeError:  # the reader has gone: nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        _fail(f"cannot write the output: {error.strerror or error}", 2)
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        if not sys.argv[1:]:
            print(error.format_message())
            sys.exit(0)
        _fail(" ".join(error.format_message().split()), 2)  # an argument that Typer refuses
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def _print_warning(message: Warning | str, *args: object, **kwargs: object) -> None:
    print(f"warning: {message}", file=sys.stderr)
