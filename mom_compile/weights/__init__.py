"""Weights on the host: their selection, their files, and saving and loading of such models."""

from mom_compile.weights.loading import load_offloaded
from mom_compile.weights.offload import OffloadedWeights, offload_weights

__all__ = ["OffloadedWeights", "load_offloaded", "offload_weights"]
