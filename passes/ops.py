"""`mom::` operators that rewritten graphs call, with their fake kernels and a reference each.

The references run anywhere, so a rewritten graph is always executable; a runtime registers
faster kernels for its devices under the same names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

LIBRARY = torch.library.Library("mom", "DEF")

LIBRARY.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, SymInt start, bool is_causal, float scale,"
    " int? window=None, Tensor? keys=None, Tensor? segments=None, Tensor? positions=None, Tensor? spans=None)"
    " -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
"""Rows [start, start + R) of an attention over whole keys and values.

query `[B, H, R, D]`, key and value `[B, G, T, D]` with H a multiple of G (grouped heads), mask
boolean or additive, broadcastable to `[B, H, R, T]`, or None. With `is_causal`, row `i` of the query
stands at position `start + i` and sees keys up to and including it; with `window` it sees the last
`window` of those.

What is said of each key by itself comes as a vector `[B or 1, T]` instead of a mask: `keys`, boolean, which of them may
be seen at all (no padding); `segments`, whose number a key must share with the query; `positions`, which must be at
most the query's and, with `window` and without `is_causal`, more than that less `window`. Queries read theirs of
the last two where they stand, `start + i`. `spans` is what `mom.spans` has found in these three; without it, or where
it found nothing, they are applied as masks.

The result is `[B, H, R, Dv]`, stored row-major in tokens (`[B, R, H, Dv]`), so that
folding the heads back together is free. A row that sees nothing is zero, as it is with PyTorch's flash
kernel on the CPU; a row whose every key is masked by the dtype's smallest number sees all of them alike.
"""


LIBRARY.define("copy_rows(Tensor rows, int[] order) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
"""Rows in a storage of their own, dense, with their dimensions in `order` from the outermost in storage.

An operator of its own, since Inductor takes a `clone` whose strides are its source's for nothing and drops it.
"""

COPY_ROWS = torch.ops.mom.copy_rows.default


def output_like(query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """An uninitialised result: `[B, H, R, Dv]`, stored `[B, R, H, Dv]`."""
    batch, heads, rows, _ = query.shape
    return query.new_empty(batch, rows, heads, value.shape[-1]).transpose(1, 2)


def visible(rows: int, keys: int, start: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Boolean `[rows, keys]`: which keys a causal row may see."""
    query_position = torch.arange(start, start + rows, device=device)[:, None]
    key_position = torch.arange(keys, device=device)[None, :]
    seen = key_position <= query_position
    if window is not None:
        seen &= key_position > query_position - window
    return seen


@dataclass(frozen=True)
class KeyConditions:
    """What a call says of each key by itself: vectors `[B or 1, T]` (see `mom.attention`)."""

    keys: torch.Tensor | None = None
    segments: torch.Tensor | None = None
    positions: torch.Tensor | None = None

    def __bool__(self) -> bool:
        return any(v is not None for v in (self.keys, self.segments, self.positions))

    def visible(
        self, rows: tuple[int, int], keys: tuple[int, int], window: int | None, device: torch.device
    ) -> torch.Tensor:
        """Boolean `[B or 1, 1, rows, keys]`, or `[.., 1, keys]`: which keys of a range queries of a range may see."""
        seen = torch.ones((1, 1, 1, keys[1] - keys[0]), dtype=torch.bool, device=device)
        if self.keys is not None:
            seen = seen & self.keys[:, None, None, slice(*keys)]
        if self.segments is not None:
            seen = seen & (self.segments[:, None, None, slice(*keys)] == self.segments[:, None, slice(*rows), None])
        if self.positions is not None:
            ahead = self.positions[:, None, slice(*rows), None] - self.positions[:, None, None, slice(*keys)]
            seen = seen & (ahead >= 0 if window is None else (ahead >= 0) & (ahead < window))
        return seen


def attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    start: int,
    is_causal: bool,
    scale: float,
    window: int | None = None,
    keys: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    spans: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definition, in plain PyTorch. Softmax in float32 at least."""
    group = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(group, dim=1)
    value = value.repeat_interleave(group, dim=1)
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = (query.to(wide) @ key.to(wide).transpose(-1, -2)) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.to(wide)
    if is_causal:
        seen = visible(query.shape[2], key.shape[2], start, window, query.device)
        scores = scores.masked_fill(~seen, -math.inf)
    conditions = KeyConditions(keys, segments, positions)
    if conditions:
        rows, of_positions = (start, start + query.shape[2]), None if is_causal else window
        seen = conditions.visible(rows, (0, key.shape[2]), of_positions, query.device)
        scores = scores.masked_fill(~seen, -math.inf)
    # The softmax of a row that sees nothing is NaN; a NaN that the user put in stays one.
    blind = (scores == -math.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores, dim=-1).masked_fill(blind, 0.0)
    out = output_like(query, value)
    return out.copy_((weights @ value.to(wide)).to(query.dtype))


@torch.library.register_fake("mom::attention", lib=LIBRARY)
def _attention_fake(query, key, value, *others, **named):  # type: ignore[no-untyped-def]
    return output_like(query, value)


def copy_rows(rows: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    own = torch.empty_permuted(rows.shape, list(order), dtype=rows.dtype, device=rows.device)
    return own.copy_(rows)


@torch.library.register_fake("mom::copy_rows", lib=LIBRARY)
def _copy_rows_fake(rows: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    return torch.empty_permuted(rows.shape, list(order), dtype=rows.dtype, device=rows.device)


LIBRARY.impl("copy_rows", copy_rows, "CompositeExplicitAutograd")
LIBRARY.impl("attention", attention_reference, "CompositeExplicitAutograd")

LIBRARY.define(
    "spans(Tensor? keys, Tensor? segments, Tensor? positions) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)
"""Looks once at what is said of the keys, and tells which range of keys `[first, end)` each query may see.

`[B or 1, N, 2]` int64, on the CPU: one range for all queries (N = 1), or one for each token where there are segments
(N = T). Ranges do not know of causality, but where there are `positions` they are given only if these grow by one from
token to token within a segment, so that they say what an index would. -1 where what may be seen is no range.
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
