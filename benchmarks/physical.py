"""Lower bounds of a prefill: bytes that must be live, operations, bytes that must be read.

    live      the residual stream, B * S * hidden values, and the cache, 2 * layers * B * S * KV heads * head size. With
              the cache on the host, keys and values of one layer in its place
    prefill   products of all layers but the last, which needs only keys and values for every token, and causal
              attention, 2 * S^2 * hidden operations a sequence (half of two products of S * S * hidden)
    decode    every weight except the embedding table, and the cache, read once for each token

Divided by the rates that the machine reaches in a large product and in copying memory, these are the minimum times.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks import measure
from benchmarks.methods import Setup
from benchmarks.models import SHAPES


@dataclass(frozen=True)
class Rates:
    """Rates of a device: operations per second of a product, bytes per second that a copy reads and writes."""

    flops: float
    bandwidth: float


def itemsize(setup: Setup) -> int:
    return int(torch.empty((), dtype=getattr(torch, setup.dtype)).element_size())


def _widths(setup: Setup) -> tuple[int, int, int, int]:
    """Return hidden size, intermediate size, width of keys, and vocabulary."""
    shape = SHAPES[setup.shape]
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"]
    return hidden, shape["intermediate_size"], hidden // heads * shape["num_key_value_heads"], shape["vocab_size"]


def cache_bytes(setup: Setup, *, layers: int | None = None) -> int:
    """Return the bytes of keys and values of all layers, or of `layers`."""
    keys = _widths(setup)[2]
    count = setup.layers if layers is None else layers
    return 2 * count * setup.batch * setup.tokens * keys * itemsize(setup)


def live_bytes(setup: Setup, *, cache_on_host: bool) -> int:
    """Return the bytes above the weights that every prefill has live at once on the device."""
    residual = setup.batch * setup.tokens * _widths(setup)[0] * itemsize(setup)
    return residual + cache_bytes(setup, layers=1 if cache_on_host else None)


def layer_weights(setup: Setup) -> int:
    hidden, inner, keys, _ = _widths(setup)
    return 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * inner


def prefill_flops(setup: Setup) -> float:
    """Return the operations of a prefill that computes only what is needed."""
    hidden, _, keys, vocabulary = _widths(setup)
    tokens = setup.batch * setup.tokens
    whole = 2.0 * tokens * layer_weights(setup) + 2.0 * setup.batch * setup.tokens**2 * hidden
    last = 2.0 * tokens * 2 * hidden * keys + 2.0 * setup.batch * hidden * vocabulary
    return (setup.layers - 1) * whole + last


def decode_bytes(setup: Setup) -> int:
    """Return the bytes that one decode step reads, for all sequences."""
    hidden, _, _, vocabulary = _widths(setup)
    weights = setup.layers * layer_weights(setup) + hidden * vocabulary
    return weights * itemsize(setup) + cache_bytes(setup)


def measure_rates(device: str, dtype: str) -> Rates:
    """Return the best of five runs of a square product and of a copy."""
    kind: Any = getattr(torch, dtype)
    size, copied = (2048, 1 << 28) if device == "cpu" else (8192, 1 << 31)
    a, b = (torch.randn(size, size, dtype=kind, device=device) for _ in range(2))
    product = min(measure.seconds(partial(torch.mm, a, b), device) for _ in range(5))
    source = torch.ones(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = min(measure.seconds(partial(target.copy_, source), device) for _ in range(5))
    return Rates(2 * size**3 / product, 2 * copied / copy)
