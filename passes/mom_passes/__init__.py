"""Graph-to-graph passes that turn a decoder's ATen graph into loops over mini-sequences.

A self-contained FX library: it imports torch, sympy and networkx, never `mom_compile`.
"""
