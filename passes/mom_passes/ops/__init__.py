"""The operators of `mom::`. Importing this package defines them."""

from mom_passes.ops import attention, products, rows, scored, spans, transfers

__all__ = ["attention", "products", "rows", "scored", "spans", "transfers"]
