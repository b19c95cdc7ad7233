"""Where it is decided whether a Triton kernel runs or the reference beside it."""

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl  # kernels take it from here
except ImportError:  # there are no wheels for every platform
    triton = tl = None

__all__ = ["choose", "constexpr", "jit", "power_of_two", "tl"]
constexpr: Any = int if triton is None else tl.constexpr
Result = TypeVar("Result")
Other = TypeVar("Other")
FAILED: set[str] = set()  # kernels that did not compile or start here


def jit(kernel: Callable[..., None]) -> Any:
    """`triton.jit`, or the function as it is where there is no Triton to run it."""
    return kernel if triton is None else triton.jit(kernel)


def runs_on(x: Tensor) -> bool:
    """Whether kernels run where a tensor is: on a GPU, with Triton."""
    return triton is not None and x.is_cuda


def choose(
    name: str, at: Tensor, kernel: Callable[[], Result], reference: Callable[[], Other]
) -> Result | Other:
    """The result of `kernel` if `at` is on a GPU with Triton, else that of `reference`.

    Triton launches on the current device, wherever its arguments lie: so that of `at` is made
    current. From another one a kernel would not wait for those who write its arguments. A kernel
    that fails is not tried again in this process; one warning says so.
    """
    if not runs_on(at) or name in FAILED:
        return reference()
    try:
        with torch.cuda.device_of(at):
            return kernel()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers raise errors of many kinds
        FAILED.add(name)
        told = (str(error).splitlines() or [""])[0]
        warnings.warn(
            f"the Triton kernel {name} failed, a slower path is used instead: "
            f"{type(error).__name__}: {told}",
            RuntimeWarning,
            stacklevel=3,
        )
        return reference()


def power_of_two(size: int, least: int = 16) -> int:
    """The next power of two that a block of this size fits into."""
    return max(least, 1 << (size - 1).bit_length())
