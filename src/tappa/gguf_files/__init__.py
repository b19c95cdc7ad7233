"""GGUF files: their header, what kind of file it is, and a model that is what the file says."""

from tappa.gguf_files.header import Header, TensorInfo, read_header
from tappa.gguf_files.reading import describe_gguf, read_gguf

__all__ = ["Header", "TensorInfo", "describe_gguf", "read_gguf", "read_header"]
