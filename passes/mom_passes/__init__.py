"""Graph-to-graph passes that turn a decoder's ATen graph into loops over mini-sequences.

A self-contained FX library: it imports torch, sympy and networkx, never `mom_compile`.
"""

__all__ = [
    "attention", "errors", "graph", "host", "loops", "ops", "program", "rules", "tokens", "torch_compat", "verify",
]  # fmt: skip
