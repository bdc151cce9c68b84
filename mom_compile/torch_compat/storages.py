"""Whether another tensor uses the same storage.

_storage_Use_Count    the reference count of the C++ storage. Inductor's CUDA graph trees also read it.
Tensor._use_count     the reference count of the C++ tensor. The Python object holds one reference; DLPack, a view, and
                      a graph that saved the tensor for a gradient hold others.
Tensor._base          the tensor that a view is a view of. In inference mode views have no base.
"""

from __future__ import annotations

import sys

import torch


def _storage_uses(value: torch.Tensor) -> int:
    """Return the number of tensors that use the storage of `value`, plus a constant."""
    return torch._C._storage_Use_Count(value.untyped_storage()._cdata)


def _tensor_uses(value: torch.Tensor) -> int:
    return value._use_count()  # type: ignore[attr-defined]


def _base_references(view: torch.Tensor) -> int:
    """Return the number of references to the base of a view, plus a constant."""
    return sys.getrefcount(view._base)


def _is_foreign(storage: torch.UntypedStorage) -> bool:
    """Return whether the memory may belong to NumPy, a file, another process or another storage.

    On a GPU `is_shared` is always true.
    """
    return not storage.resizable() or (storage.device.type == "cpu" and storage.is_shared())


def _shares_storage_with_base(view: torch.Tensor) -> bool:
    """Return False after an assignment to `view.data`."""
    base = view._base
    return base is not None and base.untyped_storage()._cdata == view.untyped_storage()._cdata


# The counts of tensors that nothing else refers to.
with torch.inference_mode(False):
    _ONE = torch.empty(2, device="cpu")
    _STORAGE_USES_OF_ONE, _TENSOR_USES_OF_ONE = _storage_uses(_ONE), _tensor_uses(_ONE)
    _VIEW = torch.empty(2, device="cpu")[:1]
    _REFERENCES_OF_BASE, _TENSOR_USES_OF_BASE = _base_references(_VIEW), _tensor_uses(_VIEW._base)  # type: ignore[arg-type]


def is_alone(value: torch.Tensor) -> bool:
    """Return whether no other tensor, and nothing outside of PyTorch, uses the memory of `value`.

    A tensor that only `value` keeps alive does not count: outside of inference mode a view keeps its base alive.
    """
    uses = _storage_uses(value) - _STORAGE_USES_OF_ONE
    if _tensor_uses(value) > _TENSOR_USES_OF_ONE or _is_foreign(value.untyped_storage()):
        return False
    if uses != 1 or not value._is_view() or not _shares_storage_with_base(value):
        return uses == 0
    base_is_free = _base_references(value) == _REFERENCES_OF_BASE
    return base_is_free and _tensor_uses(value._base) == _TENSOR_USES_OF_BASE  # type: ignore[arg-type]
