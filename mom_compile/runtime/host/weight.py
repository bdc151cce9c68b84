"""`HostWeight`: a parameter with the shape and device of a device tensor whose bytes stay in their host storage.

    operator                          implementation
    --------                          --------------
    a view (t, slice, split, ...)     a view of the inner tensor, still on the host
    rows by an index (an embedding)   selected on the host; only these are copied to the device
    clone, another dtype              on the host: the result is a host weight too
    writing into it                   on the host, once no copy reads it; a weight in a mapped file is copied first
    anything else                     `mom.fetch_weight` copies all of it to the device, and the operator runs there

A model compiled by mom prefetches these copies before the stage that reads them. In eager mode each use fetches the
weight again, which is correct but slow; a warning says so once.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from mom_compile.notices import warn_once
from mom_compile.runtime.host.engines import engine_with_own_memory
from mom_compile.runtime.host.holders import READERS
from mom_compile.runtime.host.store import without_base
from mom_compile.runtime.host.tensor import HostTensor
from mom_compile.runtime.host.tensor_points import refusal
from mom_compile.runtime.host.weight_bytes import WeightBytes, bytes_under
from mom_compile.torch_compat.tensors import make_wrapper

aten = torch.ops.aten
EMBEDDING = aten.embedding.default

NOT_COMPILED = (
    "weights that are stored on the host are copied to the device at each use, which is slow. Compile the model, "
    "model.compile(backend='mom'), and call it without gradients, so that they are prefetched one layer ahead"
)


class HostWeight(HostTensor):
    """A parameter whose bytes are on the host, in memory or in a mapped file.

    The parameter has the shape, dtype and device that the model expects. Compiled programs copy it one layer ahead of
    its use. In eager mode each use copies it, which is correct and slow; a warning says so once.

    Attributes
    ----------
    host : torch.Tensor
        The bytes on the host, with the same shape and dtype.
    """

    lease: WeightBytes | None  # type: ignore[assignment]
    #: Of a weight in a file: state shared with its views until the weight has been copied.
    mapped: Mapped | None
    _inner: torch.Tensor

    @staticmethod
    def __new__(
        cls, inner: torch.Tensor, device: torch.device, lease: WeightBytes | None = None, mapped: Mapped | None = None
    ) -> HostWeight:
        made: HostWeight = make_wrapper(cls, inner, device, offset=0)
        made._inner = inner
        made.lease = lease
        made.mapped = mapped
        return made

    @property
    def host(self) -> torch.Tensor:  # type: ignore[override]
        if self.mapped is not None and self.mapped.copy is not None:
            self._become(self.mapped.view_of_copy(self._inner))
        return self._inner

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], device: str, size: Any, stride: Any) -> HostWeight:
        return HostWeight(inner["host"], torch.device(device), getattr(inner["host"], "_lease", None))

    def _stable_hash_for_caching(self) -> str:
        return f"HostWeight({self.device})"

    def run_on_host(self, func: Any, args: Any, kwargs: Any) -> Any:
        rows = _rows(func, args)
        if rows is not None and not isinstance(rows, HostTensor) and not (self.traced and func is not EMBEDDING):
            return torch.ops.mom.fetch_rows(self.host, rows, self.device)
        if self.traced:
            return NotImplemented
        if func is aten._to_copy.default:
            return self._copied(kwargs)
        if func is aten.clone.default:
            return host_weight(func(self.settled(), **kwargs), self.device)
        return NotImplemented

    def fetch(self) -> torch.Tensor:
        """Copy the weight to its device.

        Returns
        -------
        torch.Tensor
            A plain tensor on the device.
        """
        if not self.traced:
            warn_once("uncompiled weights", NOT_COMPILED)
        fetched: torch.Tensor = torch.ops.mom.fetch_weight(self.host, self.device)
        return fetched

    def wrap_view(self, view: torch.Tensor) -> HostWeight:
        if self.traced:
            return HostWeight(view, self.device)
        return _holding(view, self.lease, self.device, self.mapped)

    def rewrap(self) -> HostWeight:
        return _holding(self.host, self.lease, self.device, self.mapped)

    def check_may_be_written(self, func: Any) -> None:
        self.check_not_read(func)
        if self.lease is not None and self.lease.in_file:
            if self.mapped is None:
                self.mapped = Mapped(self.host)
            self.mapped.take()

    def check_not_read(self, what: Any) -> None:
        """Raise `RuntimeError` if a program of another thread reads it."""
        if self.lease is not None and READERS.read_by_other_thread(self.lease):
            raise RuntimeError(
                f"{what} would change a weight that a running model reads: wait until the model has returned. "
                "The weight is unchanged"
            )

    def _become(self, inner: torch.Tensor, mapped: Mapped | None = None) -> None:
        """Replace the bytes by those of `inner`."""
        self.lease = bytes_under(inner)
        self.mapped = mapped
        self._inner = without_base(inner)
        self._inner._lease = self.lease  # type: ignore[attr-defined]

    @property
    def data(self) -> Any:
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, other: torch.Tensor) -> None:
        """Show the bytes of `other`: shared if they are in host memory, else copied there."""
        if (other.shape, other.dtype) != (self.shape, self.dtype):
            raise refusal(
                f"Assigning {other.dtype} {list(other.shape)} to .data of {self.dtype} {list(self.shape)}",
                "Assign a new parameter to the module",
                "weights",
            )
        self.check_not_read("Assigning to .data")
        plain = (other.settled() if isinstance(other, HostTensor) else other.detach()).cpu()
        if plain.stride() != self.stride():
            plain = torch.empty_strided(self.shape, self.stride(), dtype=self.dtype).copy_(plain)
        self._become(plain, other.mapped if isinstance(other, HostWeight) else None)

    def plain(self) -> torch.Tensor:
        """Return a plain tensor on the host that shares the bytes of the weight.

        Returns
        -------
        torch.Tensor
            A CPU tensor. If the weight is mapped from a file, do not write to it.
        """
        if self.lease is None or not self.lease.in_file:
            return without_base(self.settled())
        if self.mapped is None:
            self.mapped = Mapped(self.host)
        return self.mapped.plain(self.settled())

    def _copied(self, kwargs: dict[str, Any]) -> torch.Tensor:
        """Convert to another dtype on the host, or copy to another device."""
        options = {name: value for name, value in kwargs.items() if value is not None} | {"non_blocking": False}
        device = torch.device(options.pop("device", self.device))
        changed: torch.Tensor = self.settled()
        if options.keys() - {"non_blocking", "layout"}:
            changed = aten._to_copy.default(changed, **options)
        if device == self.device:
            return host_weight(changed if changed is not self.host else changed.clone(), device)
        if changed is self.host and engine_with_own_memory(device) is not None:
            fetched: torch.Tensor = torch.ops.mom.fetch_weight(self.host, device)
            return fetched
        return changed.to(device, copy=changed is self.host)

    def __deepcopy__(self, memo: dict[int, Any]) -> HostWeight:
        copied = memo.get(id(self))
        if copied is None:
            plain = without_base(self.settled())
            in_file = self.lease is not None and self.lease.in_file
            # Parameters that share a storage share the copy. A mapped file is one storage, so it is not copied whole.
            plain = plain.clone() if in_file else copy.deepcopy(plain, memo)
            copied = memo[id(self)] = _like(self, host_weight(plain, self.device))
        assert isinstance(copied, HostWeight)
        return copied

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, tuple[Any, ...]]:
        parameter = isinstance(self, torch.nn.Parameter)
        return _rebuild, (own_storage(self.settled()), self.device, parameter, self.requires_grad)


class Mapped:
    """Copy-on-write state of a weight in a file, shared by the tensors that show parts of it.

    The first write copies the weight to memory; from then on all of them show the copy.
    """

    def __init__(self, whole: torch.Tensor) -> None:
        self.whole = whole
        self.copy: torch.Tensor | None = None
        self._plain: dict[tuple[Any, ...], torch.Tensor] = {}

    def take(self) -> None:
        if self.copy is None:
            self.copy = _flat(self.whole).clone()

    def view_of_copy(self, view: torch.Tensor) -> torch.Tensor:
        """Return the view of the copy that corresponds to a view of the file."""
        assert self.copy is not None
        first = self.whole.storage_offset() * self.whole.element_size()
        offset = (view.storage_offset() * view.element_size() - first) // view.element_size()
        with torch.inference_mode(False), torch.no_grad():
            made = torch.empty(0, dtype=view.dtype)
            return made.set_(self.copy.untyped_storage(), offset, view.shape, view.stride())

    def plain(self, view: torch.Tensor) -> torch.Tensor:
        """Return a tensor with its own storage; the same one for equal views, so that they stay tied."""
        key = (view.storage_offset(), view.dtype, view.shape, view.stride())
        if key not in self._plain:
            self._plain[key] = own_storage(view)
        return without_base(self._plain[key])


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """Return all elements from the tensor's first to its last in memory, `[n]`."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((last + 1 if tensor.numel() else 0,), (1,))


def own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same bytes as a tensor whose storage has nothing else.

    Saving or sharing it then takes no more bytes, and does not move the original storage.
    """
    with torch.inference_mode(False), torch.no_grad():
        raw = _flat(tensor.detach()).view(torch.uint8)
        shared = torch.from_dlpack(raw) if raw.numel() else raw.clone()
        return shared.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), 0)


def host_weight(plain: torch.Tensor, device: torch.device) -> HostWeight:
    """Wrap a plain tensor on the host as a weight, without a copy."""
    holder = bytes_under(plain)
    return _holding(plain.detach(), holder, device, Mapped(plain.detach()) if holder.in_file else None)


def _holding(
    view: torch.Tensor, lease: WeightBytes | None, device: torch.device, mapped: Mapped | None = None
) -> HostWeight:
    inner = without_base(view)
    inner._lease = lease  # type: ignore[attr-defined]
    with torch.inference_mode(False):
        return HostWeight(inner, device, lease, mapped)


def _like(original: torch.Tensor, made: HostWeight) -> HostWeight:
    if not isinstance(original, torch.nn.Parameter):
        return made
    return torch.nn.Parameter(made, requires_grad=original.requires_grad)  # type: ignore[return-value]


def _rebuild(plain: torch.Tensor, device: torch.device, parameter: bool, requires_grad: bool) -> torch.Tensor:
    """Return an unpickled weight; a plain tensor if `map_location` has moved it or its device does not exist."""
    gone = device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    made = plain if plain.device.type != "cpu" or gone else host_weight(plain, device)
    return torch.nn.Parameter(made, requires_grad=requires_grad) if parameter else made


torch.serialization.add_safe_globals([_rebuild])


def _rows(func: Any, args: Any) -> torch.Tensor | None:
    """Return the index tensor by which an operator selects rows of a table, or None."""
    if func is EMBEDDING:
        return args[1]  # type: ignore[no-any-return]
    if func is aten.index_select.default and args[1] == 0:
        return args[2]  # type: ignore[no-any-return]
    if func is aten.index.Tensor and len(args[1]) == 1:
        index = args[1][0]
        return None if index is None or index.dtype in (torch.bool, torch.uint8) else index
    return None
