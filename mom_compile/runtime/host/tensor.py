"""`HostTensor`: keys or values that a model sees on its device and that are in host memory.

Terms
-----
inner   The tensor in host memory, its `host`: rows of a store, or a view of such rows.

    operator                          what happens
    --------                          ------------
    a view (slice, permute, ...)      a view of the inner tensor, still on the host
    choosing or copying batch rows    done on the host: beam search never brings a cache back
    writing into it                   written on the host, if nobody else sees those rows
    changing its shape in place       refused: whoever else has it would see another tensor
    anything else                     `mom.fetch` brings it to the device, and the operator runs there

What is no operator is in `host_doors.py`. A graph that takes a `HostTensor` gets its inner tensor as the input and a
`mom.fetch` in front of each reader.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mom_compile.runtime.host.engines import beside
from mom_compile.runtime.host.holders import settle
from mom_compile.runtime.host.placement import Placement
from mom_compile.runtime.host.store import HostStore, Lease, lease_of, store_of, without_base
from mom_compile.runtime.host.tensor_points import TensorPoints
from mom_compile.runtime.host.write import mutated, refuse_new_shape, returns_view, write
from mom_compile.torch_compat import OpOverload, make_wrapper, no_torch_function, tree_any, tree_map
from mom_passes.torch_compat import packet_of, schema_of

aten = torch.ops.aten

#: What rearranges batch entries or copies: the result stays on the host.
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

    # --- what Dynamo and AOTAutograd ask ---

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["host"], str(self.device)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], device: str, size: Any, stride: Any) -> HostTensor:
        return HostTensor(inner["host"], torch.device(device), getattr(inner["host"], "_lease", None))

    def _stable_hash_for_caching(self) -> str:
        return f"HostTensor({self.device})"

    def _is_view(self) -> bool:
        """A cropped cache is a tensor of its own: Dynamo would otherwise trace what it was cropped from."""
        return False

    # --- operators ---

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if isinstance(func, OpOverload) and packet_of(func) is aten.to:
            # Inside another subclass's operators it comes as it is called: a view, says its schema, and a cast mostly.
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
        own = args[0].answer(func, args, kwargs) if args and isinstance(args[0], HostTensor) else NotImplemented
        if own is not NotImplemented:
            return own
        return func(*tree_map(_fetched, args), **tree_map(_fetched, kwargs))

    def answer(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What an operator on this one gives that does not bring it to the device; else `NotImplemented`."""
        if self.traced:
            return NotImplemented
        if func in _ON_HOST:
            return _rearranged(func, args, kwargs)
        return _copied(self, kwargs) if func is aten._to_copy.default else NotImplemented

    def seen(self, view: torch.Tensor) -> HostTensor:
        """A view of the inner tensor. Whole rows of fewer tokens (a cropped cache) are leased for themselves, so that
        the others can go."""
        if self.traced:
            return HostTensor(view, self.device)
        lease = None
        if self.lease is not None and view.dim() == self.dim():
            lease = lease_of(view, token_dim(view), self.lease.root)
        return _holding(view, lease or self.lease, self.device)

    def apart(self) -> HostTensor:
        """The same, of nothing."""
        return _holding(self.host, self.lease, self.device)

    def check_may_be_written(self, func: Any) -> None:
        """Raises `RuntimeError` where somebody else would see it, or reads it now."""
        own = self.lease
        if own is not None and any(other.root is not own.root and other.overlaps(own) for other in own.store.held()):
            raise RuntimeError(
                f"{func} would change keys or values on the host that another tensor shows too: "
                "a longer or a shorter state of the same cache is still in use. Write into a clone()"
            )

    @property
    def traced(self) -> bool:
        """Whether it stands for one in a graph that is being captured."""
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

    # --- the rest of what a tensor can do ---

    def __getitem__(self, index: Any) -> Any:
        return _let_go(super().__getitem__(index))

    def narrow(self, *args: Any, **kwargs: Any) -> Any:
        return _let_go(super().narrow(*args, **kwargs))

    def split(self, *args: Any, **kwargs: Any) -> Any:
        return tuple(_let_go(part) for part in super().split(*args, **kwargs))

    def chunk(self, *args: Any, **kwargs: Any) -> Any:
        return tuple(_let_go(part) for part in super().chunk(*args, **kwargs))

    def settled(self) -> torch.Tensor:
        """The inner tensor, after the copies that are on their way."""
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
    """An unpickled host tensor, on the host again.

    A plain tensor where it cannot be one, and where `map_location` has put it elsewhere.
    """
    elsewhere = plain.device.type != "cpu"
    gone = device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    # Not copied to a store: older formats fill the storage only after this.
    return plain if elsewhere or gone else _holding(plain, None, device)


#: So that `torch.load` takes it by default, with `weights_only=True`, once mom_compile has been imported.
torch.serialization.add_safe_globals([_rebuild])


def _let_go(part: Any) -> Any:
    """A part that does not hold on to what it was cut from: autograd would note that as its base."""
    return part.apart() if isinstance(part, HostTensor) and not part.traced else part


def _is_host(value: Any) -> bool:
    return isinstance(value, HostTensor)


def _fetched(value: Any) -> Any:
    return value.fetch() if isinstance(value, HostTensor) else value


def _view(func: Any, args: Any, kwargs: Any) -> Any:
    source = args[0]
    if func is aten.as_strided.default and len(args) > 3 and args[3] is not None:
        # Counted from where its storage begins: the wrapper has one of its own.
        args = (*args[:3], args[3] - source.storage_offset() + source.host.storage_offset())
    result = func(source.host, *args[1:], **kwargs)
    if not isinstance(result, torch.Tensor):
        return type(result)(source.seen(one) for one in result)
    return source.seen(result)


def _holding(view: torch.Tensor, lease: Lease | None, device: torch.device) -> HostTensor:
    """The inner tensor may outlive its wrapper in a running graph: it holds the lease too."""
    inner = without_base(view)
    inner._lease = lease  # type: ignore[attr-defined]
    with torch.inference_mode(False):
        return HostTensor(inner, device, lease)


def _write(func: Any, args: Any, kwargs: Any) -> Any:
    """An operator that writes into host tensors: on the host, once nothing else reads or writes those rows."""
    for tensor in mutated(schema_of(func), args, kwargs):
        if not isinstance(tensor, HostTensor):
            continue
        if tensor.traced:
            raise RuntimeError(
                f"{func} writes into what is kept on the host, keys, values or weights, inside a compiled function; "
                "do it outside, or keep it on the device"
            )
        tensor.check_may_be_written(func)
    return write(func, args, kwargs, lambda value: value.settled() if isinstance(value, HostTensor) else None)


def _to_host(value: Any) -> Any:
    if isinstance(value, HostTensor):
        return value.settled()
    return value.cpu() if isinstance(value, torch.Tensor) else value


def _rearranged(func: Any, args: Any, kwargs: Any) -> HostTensor:
    """Batch entries chosen, repeated or copied, from host memory to host memory."""
    source = args[0]
    result = func(*tree_map(_to_host, args), **tree_map(_to_host, kwargs))
    store = store_of(source.host)
    # A copy that was asked to be contiguous will be looked at as if it were.
    dim = 0 if kwargs.get("memory_format") is torch.contiguous_format else token_dim(result)
    return on_host(result, source.device, store.placement if store is not None else None, dim)


def _copied(source: HostTensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """To another device or dtype. What an engine brings is changed there; what the host holds anyway, on the host."""
    # Not behind our back: the rows may be written over as soon as this has returned.
    asked = {name: value for name, value in kwargs.items() if value is not None} | {"non_blocking": False}
    device = torch.device(asked.get("device", source.device))
    if beside(device) is None:
        copied: torch.Tensor = aten._to_copy.default(source.settled(), **{**asked, "device": device})
        return copied
    fetched: torch.Tensor = torch.ops.mom.fetch(source.host, device)
    changed = asked.keys() - {"device", "non_blocking", "layout"}
    return aten._to_copy.default(fetched, **asked) if changed else fetched


def token_dim(tensor: torch.Tensor) -> int:
    """Where tokens are in keys and values as models shape them: `[..., T, D]`."""
    return max(0, tensor.dim() - 2)


def on_host(
    plain: torch.Tensor, device: torch.device, placement: Placement | None = None, dim: int | None = None
) -> HostTensor:
    """Rows of a new store, outermost along `dim`, that hold what a host tensor holds. Raises `HostMemoryError`."""
    dim = token_dim(plain) if dim is None else dim
    rows = plain.movedim(dim, 0)
    store = HostStore(rows.shape[1:], plain.dtype, rows.shape[0], placement or Placement())
    made = host_tensor(Lease(store, 0, rows.shape[0]), dim, device)
    made.host.copy_(plain)
    return made


def host_tensor(lease: Lease, dim: int, device: torch.device) -> HostTensor:
    """The host tensor that shows a lease's rows, tokens along `dim`."""
    return _holding(lease.store.rows(lease.first, lease.end).movedim(0, dim), lease, device)
