"""The recurrences of a model's code as calls of one operator each, for Dynamo to trace.

Each function here has the parameters of the function of transformers that it stands for, without those that do not
change the result. What is row-wise around the recurrence is traced as ordinary operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from mom_passes.ops import scans as _operators  # noqa: F401  defines the operators

Tensor = torch.Tensor


def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute a gated delta rule: `torch_chunk_gated_delta_rule` of transformers."""
    dtype, scale = query.dtype, key.shape[-1] ** -0.5
    query, key, value, g, beta = _in_float32(query, key, value, g, beta)
    if use_qk_l2norm_in_kernel:
        query, key = (one * torch.rsqrt((one * one).sum(-1, keepdim=True) + 1e-6) for one in (query, key))
    rows, state = torch.ops.mom.gated_delta_rule(query * scale, key, value, g, beta, _precise(initial_state))
    return rows.to(dtype), state if output_final_state else None


def kda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute Kimi Delta Attention: `chunk_kimi_delta_attention` of transformers, which divides by the norms."""
    dtype, scale = query.dtype, key.shape[-1] ** -0.5
    query, key, value, g, beta = _in_float32(query, key, value, g, beta)
    if use_qk_l2norm_in_kernel:
        query, key = (one / torch.sqrt((one * one).sum(-1, keepdim=True) + 1e-6) for one in (query, key))
    rows, state = torch.ops.mom.kda(query * scale, key, value, g, beta, _precise(initial_state))
    return rows.to(dtype), state if output_final_state else None


def mamba2_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
) -> Any:
    """Compute the scan of Mamba-2: `mamba2_chunk_scan` of transformers."""
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    dt = torch.clamp(dt, min=dt_limit[0], max=dt_limit[1])
    hidden_states, dt, A, B, C = _in_float32(hidden_states, dt, A, B, C)
    rows, state = torch.ops.mom.mamba2_scan(hidden_states, dt, A, B, C, _precise(initial_states))
    if D is not None:
        rows = rows + D[..., None] * hidden_states
    return (rows, state) if return_final_states else rows


def selective_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Any:
    """Compute the scan of Mamba: `mamba_selective_scan` of transformers."""
    dtype = hidden_states.dtype
    if delta_bias is not None:
        dt = dt + delta_bias.to(dt.dtype)[..., None]
    if delta_softplus:
        dt = F.softplus(dt)
    precise = torch.promote_types(dtype, torch.float32)
    rows, state = torch.ops.mom.selective_scan(*(value.to(precise) for value in (hidden_states, dt, A, B, C)), None)
    rows = rows.to(dtype)
    if D is not None:
        rows = rows + hidden_states * D[None, :, None]
    if z is not None:
        rows = rows * F.silu(z)
    return (rows, state) if return_last_state else rows


def linear_recurrence(
    hidden_states: Tensor,
    recurrent_gate: Tensor,
    reset: Tensor,
    recurrent_states: Tensor | None,
    acc_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Compute the linear recurrence of RecurrentGemma: `RecurrentGemmaRglru._rnn_scan` of transformers."""
    gate = (recurrent_gate * ~reset).to(acc_dtype)
    state = None if recurrent_states is None else recurrent_states.to(gate.device, acc_dtype)
    rows, last = torch.ops.mom.linear_recurrence(gate, hidden_states.to(acc_dtype), state)
    return rows.to(hidden_states.dtype), last


def _precise(state: Tensor | None) -> Tensor | None:
    return None if state is None else state.float()


def _in_float32(*values: Tensor) -> tuple[Tensor, ...]:
    return tuple(value.float() for value in values)


#: Name of an operator, for `scan_operator(..., like=name)` -> the traced function.
SCANS: dict[str, Callable[..., Any]] = {
    function.__name__: function for function in (gated_delta_rule, kda, mamba2_scan, selective_scan, linear_recurrence)
}
