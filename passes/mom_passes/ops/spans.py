"""`mom::spans`: which range of keys each query may see, looked up once for all attentions of a graph."""

from __future__ import annotations

import torch

from mom_passes.ops.library import LIBRARY

LIBRARY.define(
    "spans(Tensor? keys, Tensor? segments, Tensor? positions) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)
"""Looks once at what is said of the keys, and tells which range of keys `[first, end)` each query may see.

`[B or 1, N, 2]` int64, on the CPU: one range for all queries (N = 1), or one for each token where there are segments
(N = T). Ranges do not know of causality, but where there are `positions` they are given only if these grow by one from
token to token within a segment, so that they say what an index would. -1 where what may be seen is no range.
"""

SPANS = torch.ops.mom.spans.default


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
        known = known & (steps >= 0).all(1, keepdim=True)  # a number that comes back would be one segment in two places
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
    """For each token where its segment begins and ends, given between which tokens one ends."""
    index = torch.arange(tokens).expand(cuts.shape[0], -1)
    begins = torch.nn.functional.pad(cuts, (1, 0), value=True)
    ends = torch.nn.functional.pad(cuts, (0, 1), value=True)
    first = torch.where(begins, index, 0).cummax(1).values
    end = torch.where(ends, index + 1, tokens).flip(1).cummin(1).values.flip(1)
    return torch.stack([first, end], -1)


def _one_run(keys: torch.Tensor) -> torch.Tensor:
    """`[B, 1, 2]`: where the keys that may be seen begin and end, -1 if there are others between. None is `[0, 0)`."""
    tokens = keys.shape[1]
    index = torch.arange(tokens)
    first = torch.where(keys, index, tokens).amin(1)
    end = torch.where(keys, index + 1, 0).amax(1)
    count = keys.sum(1)
    run = torch.stack([first.where(count > 0, 0), end], -1)
    return run.where(((end - first == count) | (count == 0))[:, None], -1)[:, None]


@torch.library.register_fake("mom::spans", lib=LIBRARY)
def _spans_fake(keys, segments, positions):  # type: ignore[no-untyped-def]
    given = [v for v in (keys, segments, positions) if v is not None]
    batch = next((v.shape[0] for v in given if v.shape[0] != 1), 1)
    return torch.empty((batch, 1 if segments is None else segments.shape[1], 2), dtype=torch.int64, device="cpu")


LIBRARY.impl("spans", spans_reference, "CompositeExplicitAutograd")
