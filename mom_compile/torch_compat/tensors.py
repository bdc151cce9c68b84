"""Tensor subclasses, fake tensors, and views without checks. This file imports torch alone.

_make_wrapper_subclass            a tensor of a subclass with sizes, strides and device, and no memory
_set_throw_on_mutable_data_ptr    makes `data_ptr()` raise, as on fake tensors
_disabled_torch_function_impl     a `__torch_function__` that handles nothing
_schema                           the schema of an operator overload
overloadpacket                    the operator of an overload
TracingContext                    present while a graph is captured
_reinterpret_tensor               `as_strided` without checks
assert_size_stride                the check that Inductor's code makes of its inputs
_assert_async                     checks a condition on the device without synchronising
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._guards import TracingContext
from torch._ops import OpOverload as OpOverload
from torch._subclasses.fake_tensor import FakeCopyMode as FakeCopyMode
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_any as tree_any
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map

_guards: Any = torch._C._dynamo.guards

#: `(tensor, shape, strides, offset)` to a view that begins `offset` elements after the tensor's first one. It takes
#: half the time of `narrow`.
view_of: Callable[[torch.Tensor, tuple[int, ...], tuple[int, ...], int], torch.Tensor] = _guards._reinterpret_tensor

#: `(tensor, shape, strides)`: raises `AssertionError` if the tensor has other sizes or strides. Strides of dimensions
#: of size 1 are ignored.
assert_layout: Callable[[torch.Tensor, tuple[int, ...], tuple[int, ...]], None] = _guards.assert_size_stride

#: As `__torch_function__` of a subclass: Python functions of `torch` treat it as a plain tensor, and only operators see
#: the subclass.
no_torch_function = torch._C._disabled_torch_function_impl


def schema_of(target: Any) -> Any:
    """Return the schema of an operator overload (`arguments`, `returns`, `is_mutable`); None for other callables.

    Same as `mom_passes.torch_compat.schema_of`. It is repeated so that `mom_compile.runtime.host` needs no passes.
    """
    return getattr(target, "_schema", None)


def packet_of(target: Any) -> Any:
    """Return the operator of an overload, `aten.add` for `aten.add.Tensor`; None for other callables."""
    return getattr(target, "overloadpacket", None)


def make_wrapper(
    cls: type[torch.Tensor], inner: torch.Tensor, device: torch.device, offset: int | torch.SymInt | None = None
) -> Any:
    """Return a tensor of the subclass `cls` with the sizes and strides of `inner` and no memory of its own.

    Its storage has a null address. As for a fake tensor, `data_ptr()` raises.

    Parameters
    ----------
    offset
        The storage offset; by default that of `inner`. Dynamo makes the fake of an inner tensor with offset 0, and
        assumes that a wrapper with another offset was changed by `set_`.
    """
    made = torch.Tensor._make_wrapper_subclass(
        cls,
        inner.shape,
        strides=inner.stride(),
        storage_offset=inner.storage_offset() if offset is None else offset,
        dtype=inner.dtype,
        layout=inner.layout,
        device=device,
        requires_grad=False,
    )
    torch._C._set_throw_on_mutable_data_ptr(made)
    return made


def being_traced() -> bool:
    """Return whether Dynamo or AOTAutograd is capturing a graph."""
    return TracingContext.try_get() is not None


def assert_later(holds: torch.Tensor, message: str) -> None:
    """Check a condition that a device has computed, without synchronising with the device as `item` does."""
    torch._assert_async(holds, message)
