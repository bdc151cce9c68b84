"""Parameters that consist of several tensors: a quantised weight has codes and scales (`__tensor_flatten__`). A DTensor
has one, this rank's part.

These functions apply to the plain tensors in a parameter; a plain parameter is its only one. A quantised weight on the
host is the same subclass around host weights, so its operators fetch what they read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mom_compile.runtime.host.weight import HostWeight
from mom_passes.torch_compat import is_wrapper

#: Inner tensors of a quantised weight with fewer bytes (e.g. one scale for all of it) are moved to the device.
LEAST_INNER_BYTES = 1 << 10


def is_nested(tensor: torch.Tensor) -> bool:
    return not isinstance(tensor, HostWeight) and is_wrapper(tensor)


def leaves(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the plain tensors and host weights in a parameter."""
    if not is_nested(tensor):
        return [tensor]
    return [leaf for inner in _inner(tensor)[0].values() if isinstance(inner, torch.Tensor) for leaf in leaves(inner)]


def replaced(tensor: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Apply `change` to each plain tensor and return the parameter rebuilt from the results."""
    if not is_nested(tensor):
        return change(tensor)
    inner, context = _inner(tensor)
    changed = {name: replaced(one, change) if isinstance(one, torch.Tensor) else one for name, one in inner.items()}
    kind: Any = type(tensor)
    made: torch.Tensor = kind.__tensor_unflatten__(changed, context, tensor.shape, tensor.stride())
    return made


def _inner(tensor: torch.Tensor) -> tuple[dict[str, Any], Any]:
    """Return the parts of a parameter by name, and its context. The mesh of a DTensor is a part, but no tensor."""
    names, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return {name: getattr(tensor, name) for name in names}, context


def is_on_host(tensor: torch.Tensor) -> bool:
    return any(isinstance(leaf, HostWeight) for leaf in leaves(tensor))


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return the parameter on the CPU without host weights; it shares their bytes."""
    return replaced(tensor, lambda leaf: leaf.plain() if isinstance(leaf, HostWeight) else leaf.cpu())


def size_of(tensor: torch.Tensor) -> int:
    """Return the size in bytes."""
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves(tensor))


def fault_of(parameter: torch.Tensor) -> str | None:
    """Return why a parameter cannot be stored on the host, or None."""
    kind = type(parameter)
    plain_one = kind in (torch.Tensor, torch.nn.Parameter, HostWeight)
    if not plain_one and not is_nested(parameter):
        return (
            f"is a {kind.__module__}.{kind.__name__}, which has no __tensor_flatten__ that lists its inner tensors, "
            "so its readers would not fetch them. Name its module in `keep`"
        )
    if any(leaf.layout is not torch.strided for leaf in leaves(parameter)):
        return f"has layout {parameter.layout}; only strided tensors are supported"
    return None
