"""Arithmetic of docs/scale.md: bytes, memory and FLOP of large jobs. Nothing is run.

    python runs/scale.py

Sizes follow from the code (`LayerStatistics` has the same arrays for any model); speeds are
assumptions, written where they are used.
"""

from dataclasses import dataclass

from tappa.analysis import SHARDS
from tappa.attention_profile import ADDITIVE
from tappa.theory import BOUNDS

LAGS, TIGHTNESS_BINS, SHIFTS, SEASONS = 1024, 48, 5, 3
BYTES_OF_A_TOKEN = 4  # of English text, roughly
ID = 4  # bytes of a token's id on its way
IN_A_LIST = 36  # bytes of one in a list of Python: a pointer and an int
GPU = 200e12  # FLOP/s that a GPU is assumed to reach in bfloat16
GPU_FLOAT32 = 30e12  # and in float32, in which statistics are taken
NETWORK = 1.25e9  # bytes/s: 10 Gbit/s
ON_DRIVER = 2.7e-9  # seconds to merge, write and flush a byte of sums (benchmarks/cluster.py)


@dataclass(frozen=True)
class Size:
    """A model."""

    name: str
    parameters: float
    layers: int
    heads: int
    kv_heads: int
    dim: int  # of a head
    hidden: int

    @property
    def weights(self) -> float:
        """Bytes in bfloat16."""
        return 2 * self.parameters

    @property
    def sums(self) -> float:
        """Bytes of an Analysis: float64 and int64 arrays."""
        scalars = len(ADDITIVE) + 12
        head = 3 * self.dim // 2 + len(BOUNDS) * (2 + TIGHTNESS_BINS) + SHIFTS + SEASONS + scalars
        return 8.0 * self.layers * (self.heads * (head + 3 * LAGS) + LAGS)

    def cache(self, tokens: int) -> float:
        """Bytes of keys and values in bfloat16."""
        return 4.0 * tokens * self.layers * self.kv_heads * self.dim

    def queries(self, tokens: int, nbytes: int) -> float:
        """Bytes of one layer's queries."""
        return float(nbytes) * tokens * self.heads * self.dim

    def products(self, tokens: int) -> float:
        """FLOP of the weights."""
        return 2.0 * self.parameters * tokens

    def logits(self, tokens: int) -> float:
        """FLOP of all causal query-key products, of which attention takes two such."""
        return 1.0 * tokens**2 * self.layers * self.heads * self.dim


SMALL = Size("SmolLM2-135M", 0.135e9, 30, 9, 3, 64, 576)
ONE = Size("1B", 1.24e9, 16, 32, 8, 64, 2048)
LARGE = Size("70B", 70.6e9, 80, 64, 8, 128, 8192)


def row(what: str, *values: object) -> None:
    print(f"| {what} | {' | '.join(map(str, values))} |")


def gigabytes(value: float) -> str:
    return f"{value / 1e9:,.2f} GB" if value < 1e11 else f"{value / 1e12:,.2f} TB"


def many_models(models: int = 1000, text: float = 1e9, prompt: int = 2048) -> None:
    """1,000 models of 1B on 1 GB of text each."""
    tokens = text / BYTES_OF_A_TOKEN
    prompts = tokens / prompt
    size = ONE
    flop = (size.products(prompt) + 2 * size.logits(prompt)) * prompts
    statistics = size.logits(prompt) * prompts
    seconds = flop / GPU + statistics / GPU_FLOAT32
    row("tokens; prompts of 2,048", f"{tokens:,.0f}; {prompts:,.0f}", "")
    row("FLOP: model; statistics", f"{flop:.1e}; {statistics:.1e}", f"{models * flop:.1e}; ...")
    row("GPU hours", f"{seconds / 3600:,.2f}", f"{models * seconds / 3600:,.0f}")
    row(
        "weights, to each worker that takes part",
        gigabytes(size.weights),
        gigabytes(models * size.weights),
    )
    row("text, to the worker that makes the tokens", gigabytes(text), gigabytes(models * text))
    row(
        "token ids: to the driver, to the workers",
        gigabytes(2 * ID * tokens),
        gigabytes(models * 2 * ID * tokens),
    )
    row(
        f"sums from workers: {SHARDS} shards",
        gigabytes(SHARDS * size.sums),
        gigabytes(models * SHARDS * size.sums),
    )
    row(
        "sums written by the driver (each shard rewrites them)",
        gigabytes(SHARDS * size.sums),
        gigabytes(models * SHARDS * size.sums),
    )
    row("kept in the end", gigabytes(size.sums), gigabytes(models * size.sums))
    merging = SHARDS * size.sums * ON_DRIVER
    row("driver: seconds to merge and write sums", f"{merging:.0f}", f"{models * merging:,.0f}")
    row("driver: text, and ids as arrays", gigabytes(text + ID * tokens), "one model at a time")
    row("worker that makes the tokens: ids in lists", gigabytes(IN_A_LIST * tokens), "")
    each = size.weights / NETWORK
    row("weights at 10 Gbit/s against work of one worker", f"{each:.1f} s of {seconds:,.0f} s", "")


def long_context(tokens: int = 131072, chunk: int = 4096, gpus: int = 4) -> None:
    """One prompt of 128k tokens through a 70B model."""
    size = LARGE
    row("weights", gigabytes(size.weights), gigabytes(size.weights / gpus))
    row(
        "KV cache of the prompt",
        gigabytes(size.cache(tokens)),
        gigabytes(size.cache(tokens) / gpus),
    )
    whole, part = size.queries(tokens, 4), size.queries(chunk, 4)
    row(
        "queries of a layer in float32, prompt in one piece",
        gigabytes(whole),
        gigabytes(whole / gpus),
    )
    row(f"the same with --chunk {chunk}", gigabytes(part), gigabytes(part / gpus))
    keys = 4.0 * tokens * size.kv_heads * size.dim
    row(
        "keys of a layer in float32, with and without RoPE",
        gigabytes(2 * keys),
        gigabytes(2 * keys / gpus),
    )
    row("sums", gigabytes(size.sums), gigabytes(size.sums / gpus))
    recorded = size.layers * size.queries(tokens, 2)
    row(
        "evaluation: queries of all layers, recorded",
        gigabytes(recorded),
        gigabytes(recorded / gpus),
    )
    exchanged = 2 * 2 * size.layers * tokens * size.hidden * 2.0 * (gpus - 1) / gpus
    row("tensor parallel: all-reduce", "", gigabytes(exchanged))
    model = size.products(tokens) + 2 * size.logits(tokens)
    row(
        "FLOP: model; statistics",
        f"{model:.1e}; {size.logits(tokens):.1e}",
        f"{model / gpus:.1e}; {size.logits(tokens) / gpus:.1e}",
    )
    seconds = model / GPU / gpus, size.logits(tokens) / GPU_FLOAT32 / gpus
    row("seconds: model; statistics", "", "; ".join(f"{x:,.0f}" for x in seconds))


def main() -> None:
    print(
        f"sums: {SMALL.sums / 1e6:.2f} MB for {SMALL.name} (in a file: see benchmarks/cluster.py)\n"
    )
    print("| 1 GB of text | a 1B model | 1,000 of them |\n|---|---|---|")
    many_models()
    print("\n| one prompt of 131,072 tokens, 70B | whole | on each of 4 GPUs |\n|---|---|---|")
    long_context()


if __name__ == "__main__":
    main()
