"""The operators of `mom::`. Importing this package defines them."""

from mom_passes.ops import attention, rows, spans, transfers

__all__ = ["attention", "rows", "spans", "transfers"]
