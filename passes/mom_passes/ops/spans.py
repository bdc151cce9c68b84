"""`mom::spans`: the range of keys that each query may attend to, computed once for all attentions of a graph."""

from __future__ import annotations

import torch

from mom_passes.ops.library import define, implement

SPANS = define("spans(Tensor? keys, Tensor? segments, Tensor? positions) -> Tensor")
"""The range of keys `[first, end)` that each query may attend to under `keys`, `segments` and `positions`.

The arguments are those of `mom.attention`. The result is `[B or 1, N, 2]` int64 on the CPU: one range for all queries
(N = 1), or with `segments` one per token (N = T). Causality is not part of a range. Where `positions` are given, ranges
are returned only if positions increase by one from token to token within a segment, which makes them equivalent to
token indices. Both entries are -1 where the keys do not form a range.
"""


def spans_reference(
    keys: torch.Tensor | None, segments: torch.Tensor | None, positions: torch.Tensor | None
) -> torch.Tensor:
    keys, segments, positions = (None if v is None else v.cpu() for v in (keys, segments, positions))
    given = [v for v in (keys, segments, positions) if v is not None]
    batch, tokens = max(v.shape[0] for v in given), given[0].shape[-1]
    known = torch.ones((batch, 1), dtype=torch.bool)
    cuts = torch.zeros((batch, max(0, tokens - 1)), dtype=torch.bool)
    if segments is not None:
        steps = segments.diff(dim=1)
        known = known & (steps >= 0).all(1, keepdim=True)  # a repeated number would be one segment in two places
        cuts = cuts | (steps != 0)
    if positions is not None:
        known = known & ((positions.diff(dim=1) == 1) | cuts).all(1, keepdim=True)
    if segments is not None:
        found = _segments(cuts, tokens)
        known = known if keys is None else known & keys.all(1, keepdim=True)
    else:
        found = torch.tensor([[[0, tokens]]]).expand(batch, 1, 2)
        if keys is not None:
            found = _one_run(keys).expand(batch, 1, 2)
    return torch.where(known[:, :, None], found, -1).contiguous()


def _segments(cuts: torch.Tensor, tokens: int) -> torch.Tensor:
    """`[B, T, 2]`: where the segment of each token begins and ends. `cuts[b, t]`: a segment ends after token `t`."""
    index = torch.arange(tokens).expand(cuts.shape[0], -1)
    begins = torch.nn.functional.pad(cuts, (1, 0), value=True)
    ends = torch.nn.functional.pad(cuts, (0, 1), value=True)
    first = torch.where(begins, index, 0).cummax(1).values
    end = torch.where(ends, index + 1, tokens).flip(1).cummin(1).values.flip(1)
    return torch.stack([first, end], -1)


def _one_run(keys: torch.Tensor) -> torch.Tensor:
    """`[B, 1, 2]`: the range of keys whose flag is set, -1 if it has gaps, `[0, 0)` if there are none."""
    tokens = keys.shape[1]
    index = torch.arange(tokens)
    first = torch.where(keys, index, tokens).amin(1)
    end = torch.where(keys, index + 1, 0).amax(1)
    count = keys.sum(1)
    run = torch.stack([first.where(count > 0, 0), end], -1)
    return run.where(((end - first == count) | (count == 0))[:, None], -1)[:, None]


def _spans_fake(
    keys: torch.Tensor | None, segments: torch.Tensor | None, positions: torch.Tensor | None
) -> torch.Tensor:
    given = [v for v in (keys, segments, positions) if v is not None]
    (batch,) = torch.broadcast_shapes(*(v.shape[:1] for v in given))  # type: ignore[no-untyped-call]
    return torch.empty((batch, 1 if segments is None else segments.shape[1], 2), dtype=torch.int64, device="cpu")


implement(SPANS, spans_reference, _spans_fake)
