"""KV cache compression: scorer x budget x cache."""

from tappa.compression.cache import CompressedCache
from tappa.compression.decoding import generate, takes_over
from tappa.compression.estimate import Estimate, estimate
from tappa.compression.generation import (
    CompressedContext,
    Recording,
    check_method,
    compress_context,
    compressed,
    parse_budget,
    record,
)
from tappa.compression.methods import (
    METHODS,
    Method,
    describe_methods,
    parse_method,
    spelled_out,
    split_methods,
)
from tappa.compression.stacking import stack_caches
from tappa.compression.writing import Written, check_length, prompt_ids, write_on

__all__ = [
    "METHODS",
    "CompressedCache",
    "CompressedContext",
    "Estimate",
    "Method",
    "Recording",
    "Written",
    "check_length",
    "check_method",
    "compress_context",
    "compressed",
    "describe_methods",
    "estimate",
    "generate",
    "parse_budget",
    "parse_method",
    "prompt_ids",
    "record",
    "spelled_out",
    "split_methods",
    "stack_caches",
    "takes_over",
    "write_on",
]
