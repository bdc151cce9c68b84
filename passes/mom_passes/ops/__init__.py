"""The operators of `mom::`. Importing this package defines them."""

from mom_passes.ops import attention, products, rows, spans, transfers

__all__ = ["attention", "products", "rows", "spans", "transfers"]
