"""`tappa generate`, and `tappa methods`: what it can be done with."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import tappa
from tappa.cli.common import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    TrustOption,
    messages,
)
from tappa.cluster.estimate import parameters_of
from tappa.compression import (
    Estimate,
    check_length,
    check_method,
    describe_methods,
    parse_budget,
    prompt_ids,
    write_on,
)
from tappa.display import render_estimate, render_methods, render_written
from tappa.errors import TextError
from tappa.models import load_config
from tappa.texts import packaged_prompt, read_text


def generate(
    model: ModelArgument = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="UTF-8 text file to continue. Default: packaged prose.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    method: Annotated[
        str,
        typer.Option(help="A name of 'tappa methods', or two as a+b; options as cake(gamma=50)."),
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
    chunk: Annotated[
        int | None, typer.Option(min=1, help="Read the prompt in pieces of this many tokens.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the memory that it takes; load no weights.")
    ] = False,
    every: Annotated[int, typer.Option(min=1, help="Drop tokens every so many steps.")] = 16,
    compiled: Annotated[
        bool, typer.Option("--compile", help="On a GPU: steps by torch.compile. A minute at first.")
    ] = False,
    as_json: JsonOption = False,
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
      tappa generate model.gguf --prompt-file report.txt --chunk 4096 --dry-run
    """
    if prompt is not None and prompt_file is not None:
        raise TextError("expected --prompt or --prompt-file, got both")
    text = packaged_prompt() if prompt is None else prompt
    text = text if prompt_file is None else read_text(prompt_file)
    wanted = parse_budget(budget)
    check_method(method, wanted)
    errors = messages()
    if dry_run:
        config, tokenizer, kind = load_config(
            model, device=device, dtype=dtype, trust_remote_code=trust_remote_code
        )
        tokens = len(prompt_ids(tokenizer, text, chat))
        check_length(config, tokens, max_new_tokens)
        expected = tappa.estimate(
            *(config, tokens, method, wanted), new_tokens=max_new_tokens, chunk=chunk, dtype=kind
        )
        parameters = parameters_of(model)
        weights = None if parameters is None else parameters * kind.itemsize
        _show_estimate(expected, tokens, max_new_tokens, weights, as_json)
        return
    with errors.status("loading the model"):
        loaded = tappa.load(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    cache = tappa.compressed(loaded.model, method, wanted, analysis=analysis, every=every)
    written = write_on(
        *(cache, loaded.tokenizer, text, max_new_tokens),
        chat=chat,
        show=None if as_json else _print_piece,
        compiled=compiled,
        chunk=chunk,
    )
    if as_json:
        print(json.dumps({"method": method, "budget": cache.budget} | asdict(written)))
        return
    Console().print(render_written(written, method))


def methods(
    as_json: JsonOption = False,
) -> None:
    """List the methods of KV cache compression, with one line and the source of each.

    Any scorer combines with any budget rule: --method expected_attention+tappa.
    """
    if as_json:
        print(json.dumps(describe_methods()))
        return
    Console().print(render_methods(describe_methods()))


def _show_estimate(
    expected: Estimate, tokens: int, new: int, weights: int | None, as_json: bool
) -> None:
    if as_json:
        counts = {"prompt_tokens": tokens, "new_tokens": new, "weights_nbytes": weights}
        print(json.dumps(counts | asdict(expected)))
    else:
        Console().print(render_estimate(expected, tokens, new, weights))


def _print_piece(text: str) -> None:
    print(text, end="", flush=True)
