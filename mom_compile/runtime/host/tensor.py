"""`HostTensor`: keys or values that have the shape and device of a device tensor but are stored in host memory.

Terms
-----
inner   The tensor in host memory, its `host`: rows of a store, or a view of such rows.

    operator                          implementation
    --------                          --------------
    a view (slice, permute, ...)      a view of the inner tensor, still on the host
    selecting or copying batch rows   on the host: beam search never moves a cache to the device
    writing into it                   on the host, if no other tensor shows those rows
    changing its shape in place       refused: other references would see a changed tensor
    anything else                     `mom.fetch` copies it to the device, and the operator runs there

`tensor_points.py` covers access that is not an operator. A graph that takes a `HostTensor` gets its inner tensor as the
input and a `mom.fetch` before each reader.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mom_compile.runtime.host.engines import engine_with_own_memory
from mom_compile.runtime.host.holders import settle
from mom_compile.runtime.host.placement import Placement
from mom_compile.runtime.host.store import HostStore, Lease, lease_of, store_of, without_base
from mom_compile.runtime.host.tensor_points import TensorPoints
from mom_compile.runtime.host.write import mutated, refuse_new_shape, returns_view, write
from mom_compile.torch_compat.tensors import (
    OpOverload,
    make_wrapper,
    no_torch_function,
    packet_of,
    schema_of,
    tree_any,
    tree_map,
)

aten = torch.ops.aten

#: Operators that rearrange batch entries or copy: the result stays on the host.
_ON_HOST = frozenset({aten.index_select.default, aten.index.Tensor, aten.clone.default})


class HostTensor(TensorPoints, torch.Tensor):
    """Keys or values of a cache whose bytes are on the host.

    The tensor has the shape, dtype and device of the keys or values that it replaces. Views, `clone` and reordering of
    batch entries run on the host. Any other operator copies the tensor to the device first.

    Attributes
    ----------
    host : torch.Tensor
        The bytes on the host, with the same shape and dtype.
    """

    host: torch.Tensor
    lease: Lease | None

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device, lease: Lease | None = None) -> HostTensor:
        made: HostTensor = make_wrapper(cls, inner, device)
        made.host = inner
        made.lease = lease
        return made

    __torch_function__ = no_torch_function  # type: ignore[assignment]

    # --- protocol of Dynamo and AOTAutograd ---

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["host"], str(self.device)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], device: str, size: Any, stride: Any) -> HostTensor:
        return HostTensor(inner["host"], torch.device(device), getattr(inner["host"], "_lease", None))

    def _stable_hash_for_caching(self) -> str:
        return f"HostTensor({self.device})"

    def _is_view(self) -> bool:
        """False, also for a cropped cache: Dynamo would otherwise trace the tensor it was cropped from."""
        return False

    # --- operators ---

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if isinstance(func, OpOverload) and packet_of(func) is aten.to:
            # Other subclasses pass `aten.to` undecomposed: its schema declares a view, although it mostly casts.
            return func.decompose(*args, **kwargs)
        schema = schema_of(func)
        if schema is None:  # a higher-order operator
            return func(*tree_map(_fetched, args), **tree_map(_fetched, kwargs))
        if torch.Tag.inplace_view in func.tags:
            return refuse_new_shape(func, args, kwargs, _is_host)
        if schema.is_mutable and tree_any(_is_host, mutated(schema, args, kwargs)):
            return _write(func, args, kwargs)
        if returns_view(schema) and isinstance(args[0], HostTensor):
            return _view(func, args, kwargs)
        own = args[0].run_on_host(func, args, kwargs) if args and isinstance(args[0], HostTensor) else NotImplemented
        if own is not NotImplemented:
            return own
        return func(*tree_map(_fetched, args), **tree_map(_fetched, kwargs))

    def run_on_host(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator without copying this tensor to the device; `NotImplemented` if that is not possible."""
        if self.traced:
            return NotImplemented
        if func in _ON_HOST:
            return _rearranged(func, args, kwargs)
        return _copied(self, kwargs) if func is aten._to_copy.default else NotImplemented

    def wrap_view(self, view: torch.Tensor) -> HostTensor:
        """Wrap a view of the inner tensor. Whole rows of fewer tokens (a cropped cache) get their own lease, so that
        the others can be released."""
        if self.traced:
            return HostTensor(view, self.device)
        lease = None
        if self.lease is not None and view.dim() == self.dim():
            lease = lease_of(view, token_dim(view), self.lease.root)
        return _holding(view, lease or self.lease, self.device)

    def rewrap(self) -> HostTensor:
        """Return a new wrapper, which autograd does not see as a view."""
        return _holding(self.host, self.lease, self.device)

    def check_may_be_written(self, func: Any) -> None:
        """Raise `RuntimeError` if another tensor shows the same rows."""
        own = self.lease
        if own is not None and any(other.root is not own.root and other.overlaps(own) for other in own.store.held()):
            raise RuntimeError(
                f"{func} would change keys or values on the host that another tensor also shows: "
                "a longer or shorter state of the same cache is still in use. Write into a clone()"
            )

    @property
    def traced(self) -> bool:
        """Whether it stands for a tensor in a graph that is being captured."""
        return type(self.host) is not torch.Tensor

    def fetch(self) -> torch.Tensor:
        """Copy the tensor to its device.

        Returns
        -------
        torch.Tensor
            A plain tensor on the device with the strides of `host`.
        """
        fetched: torch.Tensor = torch.ops.mom.fetch(self.host, self.device)
        return fetched

    # --- other tensor methods ---

    def __getitem__(self, index: Any) -> Any:
        return _rewrapped(super().__getitem__(index))

    def narrow(self, *args: Any, **kwargs: Any) -> Any:
        return _rewrapped(super().narrow(*args, **kwargs))

    def split(self, *args: Any, **kwargs: Any) -> Any:
        return tuple(_rewrapped(part) for part in super().split(*args, **kwargs))

    def chunk(self, *args: Any, **kwargs: Any) -> Any:
        return tuple(_rewrapped(part) for part in super().chunk(*args, **kwargs))

    def settled(self) -> torch.Tensor:
        """Return the inner tensor once pending copies are done."""
        settle(self.host)
        return self.host

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        if self.traced:
            return f"HostTensor({self.host!r})"
        return f"HostTensor({self.settled()!r}, device='{self.device}')"

    def __deepcopy__(self, memo: dict[int, Any]) -> HostTensor:
        copied = memo.get(id(self))
        if copied is None:
            copied = memo[id(self)] = self.clone()
        assert isinstance(copied, HostTensor)
        return copied

    def __reduce_ex__(self, protocol: Any) -> tuple[Callable[..., torch.Tensor], tuple[Any, ...]]:
        return _rebuild, (self.settled().clone(), self.device)


def _rebuild(plain: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return an unpickled host tensor.

    It is a plain tensor if its device does not exist, or if `map_location` has moved it to another device.
    """
    elsewhere = plain.device.type != "cpu"
    gone = device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    # Not copied to a store: older formats fill the storage only after this call.
    return plain if elsewhere or gone else _holding(plain, None, device)


#: Lets `torch.load` accept it with `weights_only=True`, the default, once mom_compile has been imported.
torch.serialization.add_safe_globals([_rebuild])


def _rewrapped(part: Any) -> Any:
    """Drop the tensor that `part` was cut from, which autograd would otherwise record as its base."""
    return part.rewrap() if isinstance(part, HostTensor) and not part.traced else part


def _is_host(value: Any) -> bool:
    return isinstance(value, HostTensor)


def _fetched(value: Any) -> Any:
    return value.fetch() if isinstance(value, HostTensor) else value


def _view(func: Any, args: Any, kwargs: Any) -> Any:
    source = args[0]
    if func is aten.as_strided.default and len(args) > 3 and args[3] is not None:
        # The offset is relative to the wrapper's storage.
        args = (*args[:3], args[3] - source.storage_offset() + source.host.storage_offset())
    result = func(source.host, *args[1:], **kwargs)
    if not isinstance(result, torch.Tensor):
        return type(result)(source.wrap_view(one) for one in result)
    return source.wrap_view(result)


def _holding(view: torch.Tensor, lease: Lease | None, device: torch.device) -> HostTensor:
    """Wrap a view. Its inner tensor also holds the lease, since it may outlive the wrapper in a running graph."""
    inner = without_base(view)
    inner._lease = lease  # type: ignore[attr-defined]
    with torch.inference_mode(False):
        return HostTensor(inner, device, lease)


def _write(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operator that writes into host tensors on the host, once no copy accesses their rows."""
    for tensor in mutated(schema_of(func), args, kwargs):
        if not isinstance(tensor, HostTensor):
            continue
        if tensor.traced:
            raise RuntimeError(
                f"{func} writes into keys, values or weights on the host inside a compiled function; "
                "do it outside, or keep them on the device"
            )
        tensor.check_may_be_written(func)
    return write(func, args, kwargs, lambda value: value.settled() if isinstance(value, HostTensor) else None)


def _to_host(value: Any) -> Any:
    if isinstance(value, HostTensor):
        return value.settled()
    return value.cpu() if isinstance(value, torch.Tensor) else value


def _rearranged(func: Any, args: Any, kwargs: Any) -> HostTensor:
    """Select, repeat or copy batch entries within host memory."""
    source = args[0]
    result = func(*tree_map(_to_host, args), **tree_map(_to_host, kwargs))
    store = store_of(source.host)
    # The caller relies on the layout of a copy that is to be contiguous.
    dim = 0 if kwargs.get("memory_format") is torch.contiguous_format else token_dim(result)
    return on_host(result, source.device, store.placement if store is not None else None, dim)


def _copied(source: HostTensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """Copy to another device or dtype. A device with an engine converts there, others on the host."""
    # Never non-blocking: the rows may be overwritten as soon as this has returned.
    options = {name: value for name, value in kwargs.items() if value is not None} | {"non_blocking": False}
    device = torch.device(options.get("device", source.device))
    if engine_with_own_memory(device) is None:
        copied: torch.Tensor = aten._to_copy.default(source.settled(), **{**options, "device": device})
        return copied
    fetched: torch.Tensor = torch.ops.mom.fetch(source.host, device)
    changed = options.keys() - {"device", "non_blocking", "layout"}
    return aten._to_copy.default(fetched, **options) if changed else fetched


def token_dim(tensor: torch.Tensor) -> int:
    """Return the token dimension of keys and values as models shape them: `[..., T, D]`."""
    return max(0, tensor.dim() - 2)


def on_host(
    plain: torch.Tensor, device: torch.device, placement: Placement | None = None, dim: int | None = None
) -> HostTensor:
    """Copy `plain` to a new store, its rows along `dim`, and wrap it. Raises `HostMemoryError`."""
    dim = token_dim(plain) if dim is None else dim
    rows = plain.movedim(dim, 0)
    store = HostStore(rows.shape[1:], plain.dtype, rows.shape[0], placement or Placement())
    made = host_tensor(Lease(store, 0, rows.shape[0]), dim, device)
    made.host.copy_(plain)
    return made


def host_tensor(lease: Lease, dim: int, device: torch.device) -> HostTensor:
    """Return the host tensor that shows a lease's rows, with tokens along `dim`."""
    return _holding(lease.store.rows(lease.first, lease.end).movedim(0, dim), lease, device)
