"""`HostWeight`: a parameter that a model sees on its device and whose bytes stay on the host, where they lie.

    operator                          what happens
    --------                          ------------
    a view (t, slice, split, ...)     a view of the inner tensor, still on the host
    rows by an index (an embedding)   chosen on the host; only these go to the device
    clone, another dtype              done on the host: the result is a weight there, too
    writing into it                   written on the host, once no copy reads it; a mapped file is copied first
    anything else                     `mom.fetch_weight` brings all of it to the device, and the operator runs there

Compiled by mom, the last of these are moved ahead of the stretch that reads them. In eager mode each use fetches the
weight anew: right and slow, and said once.
"""

from __future__ import annotations

from typing import Any

import torch

from mom_compile.notices import warn_once
from mom_compile.runtime.host.engines import beside
from mom_compile.runtime.host.holders import READERS
from mom_compile.runtime.host.store import without_base
from mom_compile.runtime.host.tensor import HostTensor
from mom_compile.runtime.host.weight_bytes import WeightBytes, bytes_under
from mom_compile.torch_compat import make_wrapper

aten = torch.ops.aten
EMBEDDING = aten.embedding.default

NOT_COMPILED = (
    "weights that are kept on the host are fetched one by one, each where it is used: right, and slow. Compile the "
    "model, model.compile(backend='mom'), and call it without gradients, so that they arrive one layer ahead"
)


class HostWeight(HostTensor):
    """Shape, dtype and device of the parameter it is; the bytes are in `host`, on the host."""

    lease: WeightBytes | None  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device, lease: WeightBytes | None = None) -> HostWeight:
        made: HostWeight = make_wrapper(cls, inner, device)
        made.host = inner
        made.lease = lease
        return made

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], device: str, size: Any, stride: Any) -> HostWeight:
        return HostWeight(inner["host"], torch.device(device), getattr(inner["host"], "_lease", None))

    def _stable_hash_for_caching(self) -> str:
        return f"HostWeight({self.device})"

    def answer(self, func: Any, args: Any, kwargs: Any) -> Any:
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
        if not self.traced:
            warn_once("uncompiled weights", NOT_COMPILED)
        fetched: torch.Tensor = torch.ops.mom.fetch_weight(self.host, self.device)
        return fetched

    def seen(self, view: torch.Tensor) -> HostWeight:
        if self.traced:
            return HostWeight(view, self.device)
        return _holding(view, self.lease, self.device)

    def apart(self) -> HostWeight:
        return _holding(self.host, self.lease, self.device)

    def check_may_be_written(self, func: Any) -> None:
        if self.lease is not None and READERS.elsewhere(self.lease):
            raise RuntimeError(
                f"{func} would change a weight that a running model reads: wait until that has returned. "
                "Nothing has been changed"
            )
        if self.lease is not None and self.lease.in_file:
            self._become(self.settled().clone())

    def _become(self, inner: torch.Tensor) -> None:
        """From now on its bytes are these."""
        self.lease = bytes_under(inner)
        self.host = without_base(inner)
        self.host._lease = self.lease  # type: ignore[attr-defined]

    def _copied(self, kwargs: dict[str, Any]) -> torch.Tensor:
        """Another dtype on the same device stays on the host; for another device it leaves."""
        asked = {name: value for name, value in kwargs.items() if value is not None} | {"non_blocking": False}
        device = torch.device(asked.pop("device", self.device))
        changed: torch.Tensor = self.settled()
        if asked.keys() - {"non_blocking", "layout"}:
            changed = aten._to_copy.default(changed, **asked)
        if device == self.device:
            return host_weight(changed if changed is not self.host else changed.clone(), device)
        if changed is self.host and beside(device) is not None:
            fetched: torch.Tensor = torch.ops.mom.fetch_weight(self.host, device)
            return fetched
        return changed.to(device, copy=changed is self.host)

    def __deepcopy__(self, memo: dict[int, Any]) -> HostWeight:
        copied = memo.get(id(self))
        if copied is None:
            copied = memo[id(self)] = _like(self, host_weight(self.settled().clone(), self.device))
        assert isinstance(copied, HostWeight)
        return copied

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, tuple[Any, ...]]:
        return _rebuild, (self.settled().clone(), self.device, isinstance(self, torch.nn.Parameter))


def host_weight(plain: torch.Tensor, device: torch.device) -> HostWeight:
    """The weight whose bytes are those of a plain tensor on the host: nothing is copied."""
    return _holding(plain.detach(), bytes_under(plain), device)


def _holding(view: torch.Tensor, lease: WeightBytes | None, device: torch.device) -> HostWeight:
    inner = without_base(view)
    inner._lease = lease  # type: ignore[attr-defined]
    with torch.inference_mode(False):
        return HostWeight(inner, device, lease)


def _like(original: torch.Tensor, made: HostWeight) -> HostWeight:
    return torch.nn.Parameter(made, requires_grad=False) if isinstance(original, torch.nn.Parameter) else made  # type: ignore[return-value]


def _rebuild(plain: torch.Tensor, device: torch.device, parameter: bool) -> torch.Tensor:
    """An unpickled weight, on the host again; plain where `map_location` has put it elsewhere or its device is gone."""
    gone = device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    made = plain if plain.device.type != "cpu" or gone else host_weight(plain, device)
    return torch.nn.Parameter(made, requires_grad=False) if parameter else made


torch.serialization.add_safe_globals([_rebuild])


def _rows(func: Any, args: Any) -> torch.Tensor | None:
    """The index tensor by which an operator takes rows of a table, or None."""
    if func is EMBEDDING:
        return args[1]  # type: ignore[no-any-return]
    if func is aten.index_select.default and args[1] == 0:
        return args[2]  # type: ignore[no-any-return]
    if func is aten.index.Tensor and len(args[1]) == 1:
        index = args[1][0]
        return None if index is None or index.dtype in (torch.bool, torch.uint8) else index
    return None


