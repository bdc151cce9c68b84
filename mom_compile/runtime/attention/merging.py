"""Merge attention over separate sets of keys into attention over all of them.

Terms
-----
part            A kernel's result for some of the keys, `[B, H, R, Dv]`, and the logarithm of the sum of each row's
                exponentiated scores, `[B, H, R]`, at least in float32.
sees nothing    A row whose keys in a part are all masked: its log-sum-exp is -inf, its result any finite number.

The result over two parts is the mean of their results, weighted by their sums: `(1 - s) result1 + s result2` with
`s = sigmoid(lse2 - lse1)`, which neither overflows nor divides. It is exact except for rounding of the parts.

A sink is a part whose result is zero and whose log-sum-exp is the sink itself. It is merged last, as a factor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

Part = tuple[torch.Tensor, torch.Tensor]


def merge(parts: Iterable[Part], sinks: torch.Tensor | None = None) -> torch.Tensor:
    """Return attention over all keys of the parts and a sink for each head, `[H]`.

    The dtype is that of the log-sum-exps if there are several parts. The first part is overwritten. At most two results
    exist at a time if `parts` is a generator.
    """
    others = iter(parts)
    merged, merged_lse = next(others)
    for result, log_sum_exp in others:
        merged = merged.to(merged_lse.dtype)
        # -inf - -inf is NaN: a part in which a row sees nothing has a share of 0.
        share = torch.sigmoid(log_sum_exp - merged_lse).masked_fill_(log_sum_exp == -math.inf, 0.0).unsqueeze(-1)
        # `lerp_` would require a float32 copy of a half-precision result.
        merged = merged.mul_(1.0 - share).addcmul_(result, share)
        merged_lse = torch.logaddexp(merged_lse, log_sum_exp)
        del result, log_sum_exp, share  # before the next part is computed
    if sinks is None:
        return merged
    share = torch.sigmoid(merged_lse - sinks.to(merged_lse.dtype)[:, None]).unsqueeze(-1)
    return merged.mul_(share)
