"""`analyze` on SmolLM2: time against one plain forward at 2048 tokens, peak memory at 8192."""

import json

import torch
from machine import describe, in_fresh_process, peak_mb, ratios

import tappa
from tappa.texts import encode_texts, packaged_text

RUNS = 5


def ready(tokens: int) -> tuple[tappa.models.LoadedModel, torch.Tensor]:
    """The default model, and that many tokens of the packaged text."""
    loaded = tappa.load(device="cpu")
    return loaded, torch.tensor(encode_texts(loaded.tokenizer, [packaged_text()], tokens))


def run(form: str, tokens: int) -> None:
    """One plain forward pass, or one analysis, on that many tokens."""
    loaded, ids = ready(tokens)
    if form == "analyze":
        tappa.analyze(*loaded, packaged_text(), tokens=tokens)
    else:
        with torch.inference_mode():
            loaded.model(ids, use_cache=False, logits_to_keep=1)
    print(peak_mb())


def peak_of(form: str, tokens: int) -> float:
    """Peak resident size of a fresh process that does nothing else, in MB."""
    return in_fresh_process(f"import analyze; analyze.run({form!r}, {tokens})")


def main() -> None:
    loaded, ids = ready(2048)

    def plain(keep: int) -> None:
        with torch.inference_mode():
            loaded.model(ids, use_cache=False, logits_to_keep=keep)

    def whole() -> None:
        _ = tappa.analyze(*loaded, packaged_text(), tokens=2048).heads

    what = {"benchmark": "analyze", "model": "SmolLM2-135M-Instruct float32", "tokens": 2048}
    result = {
        "against_forward": ratios(whole, lambda: plain(0), RUNS),
        "against_forward_without_logits": ratios(whole, lambda: plain(1), RUNS),
        "peak_mb_at_8192": {form: peak_of(form, 8192) for form in ("plain", "analyze")},
    }
    print(json.dumps(what | result | describe()))


if __name__ == "__main__":
    main()
