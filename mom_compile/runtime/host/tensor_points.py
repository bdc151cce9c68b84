"""Ways to a tensor's bytes that no operator sees: those that a host tensor has another answer to, and those it refuses.

A host tensor has sizes, strides and a device, and no bytes there. An operator on it is dispatched, and works. What asks
for the memory itself would get a null pointer: such a way either works from a copy or raises a `RuntimeError` that says
what to do. What is refused here in Python is stopped by PyTorch in C++ (`make_wrapper`) where it gets there by itself.
"""

from __future__ import annotations

from typing import Any

import torch

from mom_compile.torch_compat.tensors import being_traced


def refusal(what: str, instead: str, of: str = "keys, values or weights") -> RuntimeError:
    return RuntimeError(
        f"{what} is not possible for {of} that are kept on the host (HostTensor): "
        f"they have no memory on their device. {instead}"
    )


class _Absent:
    """A class attribute that neither the class nor an instance has, although a base class has it."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: object, owner: type) -> Any:
        raise AttributeError(f"{owner.__name__} has no attribute {self.name!r}")


class TensorPoints:
    """What `HostTensor` overrides of `torch.Tensor`; `traced` says that it stands for one in a graph being captured."""

    @property
    def traced(self) -> bool:
        raise NotImplementedError

    def fetch(self) -> torch.Tensor:
        raise NotImplementedError

    def settled(self) -> torch.Tensor:
        raise NotImplementedError

    # --- its memory ---

    def untyped_storage(self) -> Any:
        """For PyTorch's own records of what is an alias of what, while it traces. `storage()` comes here too."""
        if self.traced or being_traced():
            return super().untyped_storage()  # type: ignore[misc]
        raise refusal("Access to the storage", "Use tensor.fetch(), a copy on its device")

    def data_ptr(self) -> int:
        raise refusal("data_ptr()", "Use tensor.fetch().data_ptr() of a copy that you hold, on its device")

    const_data_ptr = mutable_data_ptr = data_ptr

    def is_shared(self) -> bool:
        return False

    def share_memory_(self) -> Any:
        raise refusal(
            "share_memory_()",
            "Send it to another process as it is, which copies it, or use tensor.fetch().share_memory_()",
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
        raise refusal("Assigning to .data", "Write into it with copy_(), or let the cache hold the other tensor")

    # --- copies for others ---

    def __dlpack__(self, **asked: Any) -> Any:
        """A copy on the device, as the protocol allows unless `copy=False`."""
        if asked.pop("copy", None) is False:
            raise BufferError(str(refusal("DLPack export without a copy", "Export tensor.fetch(), and keep it")))
        return self.fetch().__dlpack__(**asked)

    #: What would let a library skip `__dlpack__`.
    __dlpack_c_exchange_api__ = _Absent()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        """As of a tensor on its device, from a copy."""
        return self.fetch().numpy(*args, **kwargs)

    def tolist(self) -> Any:
        return self.settled().tolist()

    def __format__(self, spec: str) -> str:
        one = self.settled()
        return one.__format__(spec) if one.dim() == 0 else object.__format__(self, spec)
