"""`mom::attention`: rows of an attention over whole keys and values, whatever the captured graph called for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from mom_passes.ops.library import LIBRARY

LIBRARY.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, SymInt start, bool is_causal, float? scale,"
    " int? window=None, Tensor? keys=None, Tensor? segments=None, Tensor? positions=None, Tensor? spans=None,"
    " Tensor? sinks=None, float? softcap=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
"""Rows [start, start + R) of an attention over whole keys and values.

query `[B, H, R, D]`, key and value `[B, G, T, D]` with H a multiple of G (grouped heads), mask
boolean or additive, broadcastable to `[B, H, R, T]`, or None. With `is_causal`, row `i` of the query
stands at position `start + i` and sees keys up to and including it; with `window` it sees the last
`window` of those. Scores are multiplied by `scale`; None stands for `1 / sqrt(D)`, where `D` is a symbol.

What is said of each key by itself comes as a vector `[B or 1, T]` instead of a mask: `keys`, boolean, which of them may
be seen at all (no padding); `segments`, whose number a key must share with the query; `positions`, which must be at
most the query's and, with `window` and without `is_causal`, more than that less `window`. Queries read theirs of
the last two where they stand, `start + i`. `spans` is what `mom.spans` has found in these three; without it, or where
it found nothing, they are applied as masks.

`sinks`, `[H]`, is one more score of every row of a head, which no mask hides and no `scale` multiplies: it takes part
in the softmax, and its weight is dropped. With `lse`, the logarithm of the sum of a row's exponentiated scores without
it, the result is the one without it times `sigmoid(lse - sink)`.

With `softcap`, `c`, a score `s` is `c tanh(s / c)`, before anything masks it; a sink stays what it is.

The result is `[B, H, R, Dv]`, stored row-major in tokens (`[B, R, H, Dv]`), so that
folding the heads back together is free. A row that sees nothing is zero, as it is with PyTorch's flash
kernel on the CPU; a row whose every key is masked by the dtype's smallest number sees all of them alike.

Kernels take an `AttentionCall`, which has a field for each argument; `as_operator` makes an operator's kernel of one.
"""

MOM_ATTENTION = torch.ops.mom.attention.default


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


@dataclass(frozen=True)
class AttentionCall:
    """What one call of `mom.attention` says: the arguments of its schema, by name and in order."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    start: int
    is_causal: bool
    scale: float
    window: int | None = None
    keys: torch.Tensor | None = None
    segments: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    spans: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    softcap: float | None = None

    @property
    def rows(self) -> int:
        return self.query.shape[2]

    @property
    def tokens(self) -> int:
        """How many keys there are."""
        return self.key.shape[2]

    @property
    def has_conditions(self) -> bool:
        return self.keys is not None or self.segments is not None or self.positions is not None

    @property
    def conditions(self) -> KeyConditions:
        return KeyConditions(self.keys, self.segments, self.positions)

    @property
    def effective_window(self) -> int | None:
        """None for a window that by their index no row would feel."""
        idle = self.window is not None and self.positions is None and self.window >= self.start + self.rows
        return None if idle else self.window

    def of_rows(self, first: int, count: int) -> AttentionCall:
        """The call whose result is rows `[first, first + count)` of this one's."""
        mask = self.mask
        if mask is not None and mask.shape[-2] != 1:
            mask = mask.narrow(-2, first, count)
        return replace(self, query=self.query.narrow(2, first, count), start=self.start + first, mask=mask)

    def output(self) -> torch.Tensor:
        """An uninitialised result: `[B, H, R, Dv]`, stored `[B, R, H, Dv]`."""
        batch, heads, rows, _ = self.query.shape
        return self.query.new_empty(batch, rows, heads, self.value.shape[-1]).transpose(1, 2)


Kernel = Callable[[AttentionCall], torch.Tensor]


def as_operator(kernel: Kernel) -> Callable[..., torch.Tensor]:
    """`kernel` with the arguments of the operator's schema. It has no gradient, and may write to what it has made."""

    def operator(*arguments, **named):  # type: ignore[no-untyped-def]
        call = AttentionCall(*arguments, **named)
        with torch.no_grad():
            return kernel(call if call.scale is not None else replace(call, scale=call.query.shape[-1] ** -0.5))

    return operator


def attention_reference(call: AttentionCall) -> torch.Tensor:
    """The definition, in plain PyTorch. Softmax in float32 at least."""
    query, mask, rows, tokens = call.query, call.mask, call.rows, call.tokens
    group = query.shape[1] // call.key.shape[1]
    key = call.key.repeat_interleave(group, dim=1)
    value = call.value.repeat_interleave(group, dim=1)
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = (query.to(wide) @ key.to(wide).transpose(-1, -2)) * call.scale
    if call.softcap is not None:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.to(wide)
    if call.is_causal:
        seen = visible(rows, tokens, call.start, call.window, query.device)
        scores = scores.masked_fill(~seen, -math.inf)
    if call.has_conditions:
        stand, of_positions = (call.start, call.start + rows), None if call.is_causal else call.window
        seen = call.conditions.visible(stand, (0, tokens), of_positions, query.device)
        scores = scores.masked_fill(~seen, -math.inf)
    # The softmax of a row that sees nothing is NaN; a NaN that the user put in stays one.
    blind = (scores == -math.inf).all(-1, keepdim=True)
    if call.sinks is not None:
        sinks = call.sinks.to(wide)[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., :tokens].masked_fill(blind, 0.0)
    return call.output().copy_((weights @ value.to(wide)).to(query.dtype))


torch.library.register_fake("mom::attention", as_operator(AttentionCall.output), lib=LIBRARY)
LIBRARY.impl("attention", as_operator(attention_reference), "CompositeExplicitAutograd")
