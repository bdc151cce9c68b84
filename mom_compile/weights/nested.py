"""A parameter that is several tensors: a quantised weight has its codes and scales inside (`__tensor_flatten__`).

What is asked of a parameter here is asked of the plain tensors in it; one that is plain is the only one. A quantised
weight on the host is the same subclass around weights on the host: its own operators fetch what they read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mom_compile.runtime.host.weight import HostWeight
from mom_passes.torch_compat import is_wrapper

#: Inside of a quantised weight, what has fewer bytes (a scale for all of it) moves to the device.
LEAST_INNER_BYTES = 1 << 10


def is_nested(tensor: torch.Tensor) -> bool:
    return not isinstance(tensor, HostWeight) and is_wrapper(tensor)


def leaves(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors and the host weights that it is made of."""
    if not is_nested(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return [leaf for name in names for leaf in leaves(getattr(tensor, name))]


def replaced(tensor: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The same of changed tensors."""
    if not is_nested(tensor):
        return change(tensor)
    names, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    inner: dict[str, Any] = {name: replaced(getattr(tensor, name), change) for name in names}
    kind: Any = type(tensor)
    made: torch.Tensor = kind.__tensor_unflatten__(inner, context, tensor.shape, tensor.stride())
    return made


def is_on_host(tensor: torch.Tensor) -> bool:
    return any(isinstance(leaf, HostWeight) for leaf in leaves(tensor))


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """As it would be without us: on the CPU, of the same bytes."""
    return replaced(tensor, lambda leaf: leaf.plain() if isinstance(leaf, HostWeight) else leaf.cpu())


def size_of(tensor: torch.Tensor) -> int:
    """Bytes."""
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves(tensor))


def fault_of(parameter: torch.Tensor) -> str | None:
    """Why a parameter cannot be kept on the host, or None."""
    kind = type(parameter)
    plain_one = kind in (torch.Tensor, torch.nn.Parameter, HostWeight)
    if not plain_one and not is_nested(parameter):
        return (
            f"is a {kind.__module__}.{kind.__name__}, which does not say what tensors it is made of "
            "(__tensor_flatten__): what reads it would not fetch it. Name its module in `keep`"
        )
    if any(leaf.layout is not torch.strided for leaf in leaves(parameter)):
        return f"is of layout {parameter.layout}; strided tensors are wanted"
    return None
