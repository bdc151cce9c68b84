"""Attention over separate keys, merged into attention over all of them.

Terms
-----
part            What a kernel makes of some of the keys: a result `[B, H, R, Dv]`, and the logarithm of the sum of each
                row's exponentiated scores, `[B, H, R]`, in float32 at least.
sees nothing    A row whose keys in a part are all masked: its log-sum-exp is -inf, its result any finite number.

A row's result over two parts is the mean of its results, weighted by their sums: with `s = sigmoid(lse2 - lse1)`, which
neither overflows nor divides, it is `(1 - s) result1 + s result2`. That is exact but for the rounding of the parts.

A sink is a part whose result is zero and whose log-sum-exp is the sink itself: merged last, once, it is a factor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

Part = tuple[torch.Tensor, torch.Tensor]


def merge(parts: Iterable[Part], sinks: torch.Tensor | None = None) -> torch.Tensor:
    """Attention over the union of the parts' keys, and a sink for each head, `[H]`: in the dtype of the log-sum-exps
    where there are several parts.

    The first part is written to. At most two results live at a time, if the parts are made as they are asked for.
    """
    others = iter(parts)
    merged, merged_lse = next(others)
    for result, log_sum_exp in others:
        merged = merged.to(merged_lse.dtype)
        # Of two -inf the difference is NaN: a part in which a row sees nothing has no share in it.
        share = torch.sigmoid(log_sum_exp - merged_lse).masked_fill_(log_sum_exp == -math.inf, 0.0).unsqueeze(-1)
        # `lerp_` would want a result in half precision copied to float32 first.
        merged = merged.mul_(1.0 - share).addcmul_(result, share)
        merged_lse = torch.logaddexp(merged_lse, log_sum_exp)
        del result, log_sum_exp, share  # not while the next part is made
    if sinks is None:
        return merged
    share = torch.sigmoid(merged_lse - sinks.to(merged_lse.dtype)[:, None]).unsqueeze(-1)
    return merged.mul_(share)
