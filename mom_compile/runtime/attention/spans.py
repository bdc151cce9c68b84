"""Attention where each query sees one range of keys: padding at either end, packed sequences. No mask is made.

    ranges found by mom.spans             computed by
    all keys                              the plain kernel
    one range for the whole batch         the plain kernel on those keys
    one range per batch entry             the plain kernel per entry, on its keys
    ranges by segment                     the plain kernel per entry and segment of the rows
    not a range (-1)                      None: the caller makes masks
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from mom_passes.ops.attention import AttentionCall, Kernel


@dataclass(frozen=True)
class Span:
    """Rows `[first, first + count)` of a call see keys `[low, high)`, causality aside."""

    first: int
    count: int
    low: int
    high: int


def spans_of(found: torch.Tensor, start: int, rows: int) -> list[Span] | None:
    """Return the spans of one batch entry, `[N, 2]`, for rows from position `start` on; None if they are not ranges."""
    if found.shape[0] > 1:
        ranges, counts = torch.unique_consecutive(found[start : start + rows], dim=0, return_counts=True)
    else:
        ranges, counts = found, torch.tensor([rows])
    spans, first = [], 0
    for (low, high), count in zip(ranges.tolist(), counts.tolist(), strict=True):
        if low < 0:
            return None
        spans.append(Span(first, count, low, high))
        first += count
    return spans if first == rows else None


def attention_in_spans(kernel: Kernel, call: AttentionCall) -> torch.Tensor | None:
    """Return `[B, H, R, Dv]`, token-major, computed from the ranges of `mom.spans`; None if it has not found ranges.

    `kernel` is called without mask and conditions. Within a range, causality by index and by positions is the same.
    """
    if call.spans is None or call.mask is not None:
        return None
    start, is_causal = call.start, call.is_causal or call.positions is not None
    batch, _, rows, _ = shape = call.query.shape
    entries = [spans_of(one, start, rows) for one in call.spans]
    if any(entry is None for entry in entries):
        return None
    size = batch if all(entry == entries[0] for entry in entries) else 1
    plain = replace(call, is_causal=is_causal, keys=None, segments=None, positions=None, spans=None)
    result: torch.Tensor | None = None
    for first, spans in zip(range(0, batch, size), entries, strict=False):
        own = slice(first, first + size)
        for part in itertools.chain.from_iterable(_without_blind_rows(span, start, is_causal) for span in spans or ()):
            at = start + part.first - part.low if is_causal else 0
            q = call.query[own, :, part.first : part.first + part.count]
            k, v = (t[own, :, part.low : part.high] for t in (call.key, call.value))
            made = kernel(replace(plain, query=q, key=k, value=v, start=at))
            if made.shape[:3] == shape[:3]:
                return made
            if result is None:
                result = call.output()
            result[own, :, part.first : part.first + part.count] = made
    return result


def _without_blind_rows(span: Span, start: int, is_causal: bool) -> Iterator[Span]:
    """Split off rows before all keys of their span, which see nothing."""
    blind = min(span.count, max(0, span.low - start - span.first)) if is_causal else 0
    if blind:
        yield Span(span.first, blind, 0, 0)  # a kernel returns zero for no keys
    if blind < span.count:
        yield Span(span.first + blind, span.count - blind, span.low, span.high)
