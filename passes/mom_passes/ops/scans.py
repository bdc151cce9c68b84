"""Recurrences over tokens: the operators that linear attention, state-space models and linear RNNs consist of.

Each takes the state before the first row and returns its rows and the state after the last one. What is row-wise around
a recurrence (norms, gates, skip connections) is not part of the operator.

    operator              state after row t
    gated_delta_rule      S = exp(g_t) S;  S += k_t (beta_t (v_t - k_t S))      one decay per head
    kda                   the same with one decay per head and channel of the key
    mamba2_scan           S = exp(dt_t A) S + dt_t x_t B_t                      one A per head
    selective_scan        S = exp(dt_t A) S + dt_t x_t B_t                      one A per channel and entry of the state
    linear_recurrence     S = a_t S + b_t

`ops/scan_references.py` computes them.
"""

from __future__ import annotations

import torch

from mom_passes.ops.library import define, implement
from mom_passes.ops.scan_references import (
    Pair,
    delta_state,
    gated_delta_rule,
    kda,
    linear_recurrence,
    mamba2_scan,
    selective_scan,
    state_dtype,
)

GATED_DELTA_RULE = define(
    "gated_delta_rule(Tensor query, Tensor key, Tensor value, Tensor decay, Tensor beta, Tensor? state=None)"
    " -> (Tensor, Tensor)"
)
"""Gated delta rule (Gated DeltaNet, arXiv 2412.06464).

query, key `[B, S, G, D]`, value `[B, S, H, Dv]`, decay (in log space) and beta `[B, S, H]`, state `[B, H, D, Dv]`,
zeros by default. H is a multiple of G. Returns rows `[B, S, H, Dv]` and the state after the last row.
"""

KDA = define(
    "kda(Tensor query, Tensor key, Tensor value, Tensor decay, Tensor beta, Tensor? state=None) -> (Tensor, Tensor)"
)
"""Kimi Delta Attention (arXiv 2510.26692): as `gated_delta_rule` with a decay `[B, S, H, D]` for each key channel."""

MAMBA2_SCAN = define(
    "mamba2_scan(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? state=None) -> (Tensor, Tensor)"
)
"""State-space duality of Mamba-2 (arXiv 2405.21060).

x `[B, S, H, P]`, dt `[B, S, H]`, A `[H]`, B and C `[B, S, G, N]`, state `[B, H, P, N]`, zeros by default. H is a
multiple of G. Returns rows `[B, S, H, P]` and the state after the last row.
"""

SELECTIVE_SCAN = define(
    "selective_scan(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? state=None) -> (Tensor, Tensor)"
)
"""Selective scan of Mamba (arXiv 2312.00752).

x and dt `[B, D, S]`, A `[D, N]`, B and C `[B, N, S]`, state `[B, D, N]`, zeros by default. Returns rows `[B, D, S]` and
the state after the last row.
"""

LINEAR_RECURRENCE = define("linear_recurrence(Tensor a, Tensor b, Tensor? state=None) -> (Tensor, Tensor)")
"""`h_t = a_t h_{t-1} + b_t`: a and b `[B, S, D]`, state `[B, D]`, zeros by default. Returns all h and the last one."""

# --- fake kernels ---


def _delta_fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor | None = None,
) -> Pair:
    return value.new_empty(value.shape), value.new_empty(delta_state(key, value), dtype=state_dtype(value))


def _mamba2_fake(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    state: torch.Tensor | None = None,
) -> Pair:
    shape = (x.shape[0], x.shape[2], x.shape[3], B.shape[-1])
    return x.new_empty(x.shape), x.new_empty(shape, dtype=state_dtype(x))


def _selective_fake(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    state: torch.Tensor | None = None,
) -> Pair:
    return x.new_empty(x.shape), x.new_empty((x.shape[0], x.shape[1], A.shape[-1]), dtype=state_dtype(x))


def _linear_fake(a: torch.Tensor, b: torch.Tensor, state: torch.Tensor | None = None) -> Pair:
    return b.new_empty(b.shape), b.new_empty((b.shape[0], b.shape[2]), dtype=state_dtype(b))


implement(GATED_DELTA_RULE, gated_delta_rule, _delta_fake)
implement(KDA, kda, _delta_fake)
implement(MAMBA2_SCAN, mamba2_scan, _mamba2_fake)
implement(SELECTIVE_SCAN, selective_scan, _selective_fake)
implement(LINEAR_RECURRENCE, linear_recurrence, _linear_fake)
