"""The header of a GGUF file: keys and tensors, read within the file's bounds, or a ModelError."""

import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from tappa.errors import ModelError

_NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_FLOATS = {GGMLQuantizationType.F32: "<f4", GGMLQuantizationType.F16: "<f2"}
_ALIGNMENT = 32  # of tensors, where the file says nothing


class TensorInfo(NamedTuple):
    """Shape (as PyTorch counts dimensions), type and place of a tensor in the file."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int

    @property
    def bytes(self) -> int:
        """Bytes in the file."""
        numbers, size = GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // numbers * size


class Header(NamedTuple):
    """Keys and tensors of a GGUF file."""

    path: Path
    values: dict[str, Any]
    tensors: dict[str, TensorInfo]

    @property
    def architecture(self) -> str:
        """`general.architecture`, the first part of the names of the model's keys."""
        return str(self.values.get("general.architecture", ""))

    def get(self, name: str, default: Any = None) -> Any:
        """A key of the architecture, as `rope.freq_base`."""
        return self.values.get(f"{self.architecture}.{name}", default)

    def numbers(self, name: str) -> list[float]:
        """The content of a small tensor of float32 or float16."""
        info = self.tensors[name]
        if info.kind not in _FLOATS:
            raise ModelError(f"expected {name} as float32 or float16, got {info.kind.name}")
        with self.path.open("rb") as file:
            file.seek(info.start)
            content = file.read(info.bytes)
        return np.frombuffer(content, _FLOATS[info.kind]).astype(float).tolist()


def read_header(path: Path) -> Header:
    """The header of a GGUF file of version 2 or 3. Raises ModelError: what is wrong, in one line.

    Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Nothing is allocated that is
    larger than the file, whatever counts and lengths it claims.
    """
    if path.stat().st_size < 4:
        raise ModelError("expected the mark GGUF, got an empty file")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        try:
            return _Reader(content).header(path)
        except struct.error as error:
            raise ModelError("it ends within its header") from error
        except UnicodeDecodeError as error:
            raise ModelError("a text of its header is no UTF-8") from error


class _Reader:
    """A position in the content of a file, and what stands there."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content = content
        self._at = 0

    def header(self, path: Path) -> Header:
        if self._content[:4] != b"GGUF":
            raise ModelError("it does not start with GGUF")
        self._at = 4
        version, tensors, keys = self._unpack("I"), self._unpack("Q"), self._unpack("Q")
        if version not in _VERSIONS:
            raise ModelError(f"expected GGUF of version 2 or 3, got {version}")
        values: dict[str, Any] = {}
        for _ in range(self._count(keys, 12)):
            name = self._string()
            if name in values:
                raise ModelError(f"the key {name!r} is there twice")
            values[name] = self._value(self._unpack("I"))
        return Header(path, values, self._tensors(self._count(tensors, 24), values))

    def _tensors(self, count: int, values: dict[str, Any]) -> dict[str, TensorInfo]:
        found: dict[str, TensorInfo] = {}
        for _ in range(count):
            name, info = self._string(), self._tensor()
            if name in found:
                raise ModelError(f"the tensor {name!r} is there twice")
            found[name] = info
        alignment = values.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment < 2**20:
            raise ModelError(f"expected general.alignment from 1 to {2**20}, got {alignment}")
        base = -(-self._at // alignment) * alignment
        found = {name: info._replace(start=base + info.start) for name, info in found.items()}
        for name, info in found.items():
            if info.start + info.bytes > len(self._content):
                raise ModelError(f"it ends before the end of its tensor {name!r}")
        return found

    def _tensor(self) -> TensorInfo:
        dimensions = self._unpack("I")
        if not 0 < dimensions <= 8:
            raise ModelError(f"expected tensors of 1 to 8 dimensions, got {dimensions}")
        shape = tuple(self._unpack("Q") for _ in range(dimensions))[::-1]
        number, start = self._unpack("I"), self._unpack("Q")
        try:
            kind = GGMLQuantizationType(number)
        except ValueError as error:
            raise ModelError(f"expected tensors of a known type, got type {number}") from error
        if math.prod(shape) == 0 or shape[-1] % GGML_QUANT_SIZES[kind][0]:
            raise ModelError(f"expected whole blocks of {kind.name}, got a tensor of {shape}")
        return TensorInfo(shape, kind, start)

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._unpack(self._number(kind))
        kind, count = self._unpack("I"), self._unpack("Q")
        if kind == _STRING:
            return [self._string() for _ in range(self._count(count, 8))]
        code = self._number(kind)
        return list(self._unpack_many(code, self._count(count, struct.calcsize("<" + code))))

    def _number(self, kind: int) -> str:
        if kind not in _NUMBERS:
            raise ModelError(f"expected a key of a known type, got type {kind}")
        return _NUMBERS[kind]

    def _count(self, count: int, size: int) -> int:
        """A count of things of at least `size` bytes that the rest of the file can hold."""
        if count * size > len(self._content) - self._at:
            raise ModelError(f"it is too short for the {count} entries that it names")
        return count

    def _string(self) -> str:
        length = self._count(self._unpack("Q"), 1)
        self._at += length
        return self._content[self._at - length : self._at].decode()

    def _unpack(self, code: str) -> Any:
        return self._unpack_many(code, 1)[0]

    def _unpack_many(self, code: str, count: int) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{count}{code}", self._content, self._at)
        self._at += count * struct.calcsize("<" + code)
        return values
