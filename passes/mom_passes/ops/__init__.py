"""The operators of `mom::`. Importing this package defines them."""

from mom_passes.ops import attention, convolution, products, rows, scored, spans, transfers

__all__ = ["attention", "convolution", "products", "rows", "scored", "spans", "transfers"]
