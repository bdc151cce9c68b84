"""Weights that stay on the host: which ones, from where, and how a model lives with them."""

from mom_compile.weights.loading import load_offloaded
from mom_compile.weights.offload import OffloadedWeights, offload_weights

__all__ = ["OffloadedWeights", "load_offloaded", "offload_weights"]
