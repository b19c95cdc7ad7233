"""`tappa verify`."""

from pathlib import Path
from typing import Annotated, Any

import typer

import tappa
from tappa.cli.common import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    TrustOption,
    extra,
    messages,
    parts,
    progress,
)
from tappa.files import check_writable_folder, made_folder, write_atomic
from tappa.texts import read_text


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
    as_json: JsonOption = False,
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
    kit = extra("tappa.verification.verify", "verify")
    wanted = kit.Verification(
        claims=kit.CLAIMS if claims is None else parts(claims),
        tokens=tokens,
        heads=[kit.parse_head(part) for part in head or []],
        count=heads,
        targets=[kit.parse_channel(part) for part in parts(targets)],
        prompts=prompts,
    )
    wanted.check()
    texts = {path.stem: read_text(path) for path in text} if text else None
    if out is not None:
        check_writable_folder(out)
    errors = messages()
    with errors.status("loading the model"):
        loaded = tappa.load(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    with progress(errors, "verifying", "steps") as update:
        found = kit.verify(
            *(loaded.model, loaded.tokenizer, wanted),
            texts=texts,
            progress=lambda claim, done, total: update(done, total),
        )
    if out is not None:
        _save(found, kit.figures(found), out)
    print(found.to_json() if as_json else kit.to_markdown(found))
    if out is not None and not as_json:
        print(f"wrote {out / 'verification.json'} and figures")
    if not found.passed:
        raise typer.Exit(1)


def _save(found: Any, pictures: dict[str, bytes], out: Path) -> None:
    with made_folder(out):
        write_atomic(out / "verification.json", found.to_json())
        for name, picture in pictures.items():
            write_atomic(out / name, picture)
