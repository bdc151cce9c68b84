"""Inductor's table of decompositions.

select_decomp_table      the operators that Inductor decomposes, with their decompositions
lowerings                the operators that Inductor has code for
suggest_memory_format    the memory format of a tensor, as eager mode propagates it
guard_or_false           evaluates a condition on sizes without adding a guard; False if that is not possible
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.lowering import lowerings
from torch._ops import OpOverload
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import guard_or_false

from mom_passes.ops.convolution import DECOMPOSITIONS

_CAT = torch.ops.aten.cat.default


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Return Inductor's table with `_cat` in place of its decomposition of `aten.cat`."""
    table = {**select_decomp_table()}
    table[_CAT] = functools.partial(_cat, table[_CAT])
    return table


def with_inductors_table(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call Inductor's back half with its own table: FxGraphCache has no keys for other tables."""
    if "get_decomp_fn" in kwargs:
        kwargs["get_decomp_fn"] = select_decomp_table
    return function(*args, **kwargs)


def _cat(of_inductor: Callable[..., Any], tensors: Sequence[torch.Tensor], dim: int = 0) -> Any:
    """Inductor's decomposition, except for the layout of the result where only one operand has elements.

    A model concatenates the keys of a prompt with an empty cache. Inductor's decomposition returns the keys in their
    own layout, token-major. Eager mode returns them head-major, and so does a decode step. Dynamo guards on strides: it
    would capture one graph for the first decode step and another one for the next.
    """
    filled = [tensor for tensor in tensors if not _is_empty(tensor, dim)]
    if len(filled) != 1 or len(tensors) == 1:
        return of_inductor(tensors, dim)
    formats = {suggest_memory_format(tensor) for tensor in tensors}
    alone = filled[0] if len({tensor.dtype for tensor in tensors}) == 1 else of_inductor(tensors, dim)
    return alone.clone(memory_format=formats.pop() if len(formats) == 1 else torch.contiguous_format)


def _is_empty(tensor: torch.Tensor, dim: int) -> bool:
    """Return whether `aten.cat` ignores an operand, without a guard on its size, as Inductor decides it."""
    legacy = tensor.dim() == 1 and guard_or_false(tensor.shape[0] == 0)
    return legacy or (dim < tensor.dim() and guard_or_false(tensor.shape[dim] == 0))


def is_only_decomposed(target: Any) -> bool:
    """Return whether Inductor decomposes an operator and has no lowering for it.

    Inductor's back half raises for a graph that calls such an operator.
    """
    if not isinstance(target, OpOverload) or target in lowerings:
        return False
    return target in select_decomp_table() or target in DECOMPOSITIONS


def decomposition(call: Callable[..., Any], values: Sequence[Any], mode: FakeTensorMode) -> fx.GraphModule:
    """Trace a function of fake values of `mode` to a graph of operators that Inductor decomposes no further."""
    with mode, enable_python_dispatcher(), torch.no_grad():
        return make_fx(call, {**select_decomp_table(), **DECOMPOSITIONS}, tracing_mode="real")(*values)  # type: ignore[no-any-return]
