"""Convolutions over the rows up to each row, from the first row or from a state, and the state that they leave.

All have a reference in plain PyTorch, which a compiler lowers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mom_passes.ops.library import define, implement

CAUSAL_CONV1D = define(
    "causal_conv1d(Tensor x, Tensor weight, Tensor? bias=None, int dilation=1, int groups=1) -> Tensor"
)
"""A convolution of `x` `[B, C, S]` with `weight` `[O, C / groups, K]` and `bias` `[O]`: `[B, O, S]`.

Row `t` of the result reads rows `t - (K - 1) * dilation .. t`. Ahead of the first row there are zeros.
"""

CONTINUED_CONV1D = define(
    "continued_conv1d(Tensor x, Tensor weight, Tensor? bias, int dilation, int groups, Tensor state)"
    " -> (Tensor, Tensor)"
)
"""As `causal_conv1d`, with `state` `[B, C, (K - 1) * dilation]` ahead of the first row, in place of zeros.

Returns the rows and the state after the last row.
"""

LAST_ROWS = define("last_rows(Tensor before, Tensor rows, int dim) -> Tensor")
"""The last rows of `before` and then `rows` along `dim`, as many as `before` has, and in its dtype and shape."""


def causal_conv1d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, dilation: int = 1, groups: int = 1
) -> torch.Tensor:
    ahead = rows_ahead(weight, dilation)
    padded = torch.ops.aten.constant_pad_nd(x, [ahead, 0]) if ahead else x
    rows: torch.Tensor = torch.ops.aten.convolution(padded, weight, bias, [1], [0], [dilation], False, [0], groups)
    return rows.contiguous()


def continued_conv1d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dilation: int, groups: int, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    joined = torch.cat([state.to(x.dtype), x], 2)
    rows: torch.Tensor = torch.ops.aten.convolution(joined, weight, bias, [1], [0], [dilation], False, [0], groups)
    return rows.contiguous(), last_rows(state, x, 2)


def last_rows(before: torch.Tensor, rows: torch.Tensor, dim: int) -> torch.Tensor:
    joined = torch.cat([before, rows], dim)
    last = joined.narrow(dim, joined.shape[dim] - before.shape[dim], before.shape[dim])
    return last.clone(memory_format=torch.contiguous_format)


def rows_ahead(weight: torch.Tensor, dilation: int) -> int:
    """How many rows ahead of its own a row of a causal convolution reads."""
    return (weight.shape[-1] - 1) * dilation


def _causal_conv1d_fake(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, dilation: int = 1, groups: int = 1
) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], x.shape[2])


def _continued_conv1d_fake(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dilation: int, groups: int, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape[0], weight.shape[0], x.shape[2]), state.new_empty(state.shape)


def _last_rows_fake(before: torch.Tensor, rows: torch.Tensor, dim: int) -> torch.Tensor:
    return before.new_empty(before.shape)


implement(CAUSAL_CONV1D, causal_conv1d, _causal_conv1d_fake)
implement(CONTINUED_CONV1D, continued_conv1d, _continued_conv1d_fake)
implement(LAST_ROWS, last_rows, _last_rows_fake)

#: Operator -> a function of other operators that computes it, for a compiler that has no lowering of it.
DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    CAUSAL_CONV1D: causal_conv1d,
    CONTINUED_CONV1D: continued_conv1d,
    LAST_ROWS: last_rows,
}
