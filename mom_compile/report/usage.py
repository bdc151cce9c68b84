"""Host memory and files that keys, values and weights take now."""

from __future__ import annotations

from dataclasses import dataclass

from mom_compile.report.notebook import html_of_text
from mom_compile.report.units import counted, in_units
from mom_compile.runtime.host.holders import HOLDERS
from mom_compile.runtime.host.region import TOTALS
from mom_compile.runtime.host.store import HostStore, pooled_bytes
from mom_compile.runtime.host.weight_bytes import WeightBytes


@dataclass(frozen=True)
class HostMemory:
    """Bytes that the KV cache and the weights take on the host.

    Attributes
    ----------
    rows : int
        Bytes of keys and values.
    memory : int
        Bytes of host memory that are held for keys and values, including `pooled`.
    disk : int
        Bytes of files that are held for keys and values.
    pooled : int
        Bytes of pinned memory that no cache uses. The next cache takes them; `empty_host_pool` frees them.
    stores : int
        Number of tensors of keys or of values.
    weights : int
        Bytes of weights in host memory.
    mapped : int
        Bytes of the files that weights are mapped from. The page cache holds as much of them as it has room for.
    """

    rows: int
    memory: int
    disk: int
    pooled: int
    stores: int
    weights: int
    mapped: int

    def __repr__(self) -> str:
        rows = f"{in_units(self.rows)} of keys and values in {counted(self.stores, 'store')}"
        held = f"{in_units(self.memory)} of memory, {in_units(self.pooled)} of it pooled; {in_units(self.disk)} of disk"
        weights = f"{in_units(self.weights)} of weights in memory, {in_units(self.mapped)} mapped from files"
        return f"<HostMemory: {rows} ({held}); {weights}>"

    def _repr_html_(self) -> str:
        return html_of_text(repr(self))


def host_memory() -> HostMemory:
    """Return what the KV cache and the weights take on the host now.

    Returns
    -------
    HostMemory
        Sizes in bytes, of the whole process.
    """
    holders = list(HOLDERS.values())
    stores = [holder for holder in holders if isinstance(holder, HostStore)]
    weights = [holder for holder in holders if isinstance(holder, WeightBytes)]
    return HostMemory(
        rows=sum(store.used_bytes for store in stores),
        memory=TOTALS.memory,
        disk=TOTALS.disk,
        pooled=pooled_bytes(),
        stores=len(stores),
        weights=sum(one.size for one in weights if not one.in_file),
        mapped=sum(one.size for one in weights if one.in_file),
    )
