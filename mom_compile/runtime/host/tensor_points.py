"""Access to a tensor's bytes that is not an operator: what a host tensor overrides or refuses.

A host tensor has sizes, strides and a device, but no memory there. Operators on it are dispatched and work. Direct
access to its memory would see a null pointer: each such method either works on a copy or raises a `RuntimeError` that
names the alternative. Where C++ code gets there without Python, PyTorch itself raises (`make_wrapper`).
"""

from __future__ import annotations

from typing import Any

import torch

from mom_compile.torch_compat.tensors import being_traced


def refusal(what: str, instead: str, of: str = "keys, values or weights") -> RuntimeError:
    return RuntimeError(
        f"{what} is not possible for {of} that are stored on the host (HostTensor): "
        f"they have no memory on their device. {instead}"
    )


class _Absent:
    """Hides a class attribute that a base class has."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: object, owner: type) -> Any:
        raise AttributeError(f"{owner.__name__} has no attribute {self.name!r}")


class TensorPoints:
    """The methods of `torch.Tensor` that `HostTensor` overrides. `traced`: it stands for a tensor in a traced graph."""

    @property
    def traced(self) -> bool:
        raise NotImplementedError

    def fetch(self) -> torch.Tensor:
        raise NotImplementedError

    def settled(self) -> torch.Tensor:
        raise NotImplementedError

    # --- memory ---

    def untyped_storage(self) -> Any:
        """Only for PyTorch's alias analysis while it traces. `storage()` calls this too."""
        if self.traced or being_traced():
            return super().untyped_storage()  # type: ignore[misc]
        raise refusal("Access to the storage", "Use tensor.fetch(), a copy on its device")

    def data_ptr(self) -> int:
        raise refusal("data_ptr()", "Use tensor.fetch().data_ptr() of a copy that you keep alive, on its device")

    const_data_ptr = mutable_data_ptr = data_ptr

    def is_shared(self) -> bool:
        return False

    def share_memory_(self) -> Any:
        raise refusal(
            "share_memory_()",
            "Send it to another process directly, which copies it, or use tensor.fetch().share_memory_()",
        )

    def apply_(self, *_: Any) -> Any:
        raise refusal("apply_()", "Use an operator, or tensor.fetch().apply_()")

    def map_(self, *_: Any) -> Any:
        raise refusal("map_()", "Use an operator, or tensor.fetch().map_()")

    @property
    def data(self) -> Any:
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, _: torch.Tensor) -> None:
        raise refusal("Assigning to .data", "Write into it with copy_(), or put the other tensor into the cache")

    # --- copies ---

    def __dlpack__(self, **options: Any) -> Any:
        """Export a copy on the device, as the protocol allows unless `copy=False`."""
        if options.pop("copy", None) is False:
            raise BufferError(str(refusal("DLPack export without a copy", "Export tensor.fetch(), and keep it")))
        return self.fetch().__dlpack__(**options)

    #: A library could use this to bypass `__dlpack__`.
    __dlpack_c_exchange_api__ = _Absent()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        """Like that of a tensor on its device, from a copy."""
        return self.fetch().numpy(*args, **kwargs)

    def tolist(self) -> Any:
        return self.settled().tolist()

    def __format__(self, spec: str) -> str:
        one = self.settled()
        return one.__format__(spec) if one.dim() == 0 else object.__format__(self, spec)
