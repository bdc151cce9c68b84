"""Triton's interpreter, patched for Inductor's kernels: NumPy runs them on CPU tensors, one program after the other.

Triton reads TRITON_INTERPRET when it is imported, so the process must be started with it. Patched:

    libdevice       its functions are stubs that return None; PyTorch's functions replace them
    max2, min2      reductions with Inductor's combine functions run element by element; NumPy's functions replace them
    indices         Triton 3.6 makes them from arrays of one number, which NumPy 2.5 does not convert
    configurations  the first of a kernel would be chosen; the one with the largest blocks has the fewest programs
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from triton.language.extra import libdevice
from triton.runtime import interpreter

#: Functions of libdevice with one argument, with two, and tests. PyTorch's have the same names, or the given one.
UNARY = (
    "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "rsqrt", "sqrt", "erf", "erfc", "erfinv", "tanh", "sinh",
    "cosh", "tan", "sin", "cos", "asin", "acos", "atan", "asinh", "acosh", "atanh", "floor", "ceil", "trunc", "lgamma",
    "abs",
)  # fmt: skip
OTHER_NAMES = {"nearbyint": "round"}
BINARY = ("pow", "atan2", "fmod", "hypot", "copysign", "nextafter")
TESTS = ("isnan", "isinf", "signbit")

#: Names of the kernels that ran, one entry for each run.
launched: list[str] = []


def prepare() -> None:
    """Raises RuntimeError if Triton compiles."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("start this process with TRITON_INTERPRET=1")
    for name in (*UNARY, *OTHER_NAMES, *BINARY):
        setattr(libdevice, name, _through_torch(getattr(torch, OTHER_NAMES.get(name, name))))
    for name in TESTS:
        setattr(libdevice, name, _through_torch(getattr(torch, name), tl.int32))
    triton_helpers.max2, triton_helpers.min2 = _reduced(np.max), _reduced(np.min)
    interpreter._patch_lang_tensor = _with_indices(interpreter._patch_lang_tensor)
    init, run = CachingAutotuner.__init__, CachingAutotuner.run

    def with_largest_blocks(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.configs = [max(self.configs, key=_block)]

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        launched.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    CachingAutotuner.__init__, CachingAutotuner.run = with_largest_blocks, counted


def _with_indices(patch: Callable[..., None]) -> Callable[..., None]:
    """Patches the methods of tensors while a kernel is interpreted."""

    def run(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return run


def _block(config: Any) -> int:
    return int(np.prod([size for name, size in config.kwargs.items() if name.endswith("BLOCK")] or [1]))


def _through_torch(function: Callable[..., torch.Tensor], result: Any = None) -> Callable[..., Any]:
    """A function of libdevice; it returns the type of its first block, or `result`."""

    def run(*args: Any, **_: Any) -> Any:
        values = [interpreter.interpreter_semantic.to_tensor(arg) for arg in args]
        made = function(*(torch.from_numpy(np.ascontiguousarray(value.handle.data)) for value in values)).numpy()
        blocks = [value for value in values if value.type.is_block()]
        scalar = (blocks or values)[0].type.scalar if result is None else result
        shape = np.broadcast_shapes(*(tuple(value.type.shape) for value in blocks))
        data = made.astype(interpreter._get_np_dtype(scalar)).reshape(shape or (1,))
        kind = tl.core.block_type(scalar, list(shape)) if blocks else scalar
        return tl.core.tensor(interpreter.TensorHandle(data, scalar), kind)

    return run


def _reduced(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(block: Any, dim: int) -> Any:
        return interpreter.ReduceOps(dim, None, False).to_tensor(function(block.handle.data, axis=dim), block.dtype)

    return run
