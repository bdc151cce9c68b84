"""`mom::attention`, the one attention operator of rewritten graphs: some query rows against keys and values."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from mom_passes.ops.library import define, implement

MOM_ATTENTION = define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, SymInt start, bool is_causal, float? scale,"
    " int? window=None, Tensor? keys=None, Tensor? segments=None, Tensor? positions=None, Tensor? spans=None,"
    " Tensor? sinks=None, float? softcap=None, SymInt? first=None) -> Tensor"
)
"""Rows `[start, start + R)` of an attention over T keys and values.

Parameters
----------
query : Tensor `[B, H, R, D]`
key, value : Tensor `[B, G, T, D]`, `[B, G, T, Dv]`
    H is a multiple of G (grouped heads).
mask : Tensor or None
    Boolean or additive, broadcastable to `[B, H, R, T]`.
start : int
    Position of query row 0 among the keys.
is_causal : bool
    Row `i` attends to keys `j <= start + i`; with `window`, only to the last `window` of those.
scale : float or None
    Factor of the scores. None is `1 / sqrt(D)`, for a symbolic D.
keys : boolean Tensor `[B or 1, T]` or None
    Keys that may be attended to at all (no padding).
segments : integer Tensor `[B or 1, T]` or None
    A query attends only to keys with its own number. The query of row `i` has the number at `start + i`.
positions : integer Tensor `[B or 1, T]` or None
    A query attends only to keys whose position is at most its own; with `window` and without `is_causal`, also greater
    than its own less `window`. The query of row `i` has the position at `start + i`.
spans : int64 Tensor or None
    The result of `mom.spans` for `keys`, `segments` and `positions`. Without it, or where it is -1, these three are
    applied as masks.
sinks : Tensor `[H]` or None
    An additional score for every row of a head, neither masked nor scaled. It takes part in the softmax and its weight
    is dropped: where `lse` is the log-sum-exp of a row without its sink, the result without the sink is multiplied by
    `sigmoid(lse - sink)`.
softcap : float or None
    Replaces a score `s` by `softcap * tanh(s / softcap)`, before masks and sinks.
first : int or None
    Keys and values are rows `[first, first + T)` of a longer sequence. `start` and the ranges of `spans` are positions
    in that sequence, and `mask`, `keys`, `segments`, `positions` and `spans` cover all of it. Rows at negative
    positions, ahead of the sequence, are ignored, whatever they contain. None: keys and values are the whole sequence.
    With `first`, rows of a causal call with `window` need the keys in their windows only (`rules/attention.py`).

Returns
-------
Tensor `[B, H, R, Dv]`
    Stored as `[B, R, H, Dv]`, so that merging the heads needs no copy. A row without visible keys is zero, as in
    PyTorch's flash kernel on the CPU; a row whose keys are all masked by the dtype's smallest number attends to all of
    them equally.
"""

Kernel = Callable[["AttentionCall"], torch.Tensor]


def visible(rows: int, keys: int, start: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Boolean `[rows, keys]`: the keys that each row of a causal attention attends to."""
    query_position = torch.arange(start, start + rows, device=device)[:, None]
    key_position = torch.arange(keys, device=device)[None, :]
    seen = key_position <= query_position
    if window is not None:
        seen &= key_position > query_position - window
    return seen


@dataclass(frozen=True)
class KeyConditions:
    """The conditions on single keys: vectors `[B or 1, T]` (see `MOM_ATTENTION`)."""

    keys: torch.Tensor | None = None
    segments: torch.Tensor | None = None
    positions: torch.Tensor | None = None

    def visible(
        self, rows: tuple[int, int], keys: tuple[int, int], window: int | None, device: torch.device
    ) -> torch.Tensor:
        """Boolean `[B or 1, 1, rows or 1, keys]`: the keys of one range that the queries of another attend to."""
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
    """The arguments of one call of `mom.attention`, in the order of its schema."""

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
    first: int | None = None

    @property
    def rows(self) -> int:
        return self.query.shape[2]

    @property
    def tokens(self) -> int:
        return self.key.shape[2]

    @property
    def has_conditions(self) -> bool:
        return self.keys is not None or self.segments is not None or self.positions is not None

    @property
    def conditions(self) -> KeyConditions:
        return KeyConditions(self.keys, self.segments, self.positions)

    @property
    def effective_window(self) -> int | None:
        """The window, or None if by token index it hides no key from any row."""
        idle = self.window is not None and self.positions is None and self.window >= self.start + self.rows
        return None if idle else self.window

    def of_rows(self, first: int, count: int) -> AttentionCall:
        """The call that computes rows `[first, first + count)` of this call's result."""
        mask = self.mask
        if mask is not None and mask.shape[-2] != 1:
            mask = mask.narrow(-2, first, count)
        return replace(self, query=self.query.narrow(2, first, count), start=self.start + first, mask=mask)

    def of_own_keys(self) -> AttentionCall:
        """The same call without `first`: on the keys of the sequence alone, numbered from zero."""
        if self.first is None:
            return self
        ahead = max(0, -self.first)
        low, count = self.first + ahead, self.tokens - ahead

        def cut(value: torch.Tensor | None, dim: int) -> torch.Tensor | None:
            return value if value is None or value.shape[dim] == 1 else value.narrow(dim, low, count)

        spans = cut(self.spans, 1)
        if spans is not None:
            spans = torch.where(spans < 0, spans, (spans - low).clamp(0, count))
        return replace(
            self,
            key=self.key.narrow(2, ahead, count),
            value=self.value.narrow(2, ahead, count),
            mask=cut(self.mask, -1),
            start=self.start - low,
            keys=cut(self.keys, 1),
            segments=cut(self.segments, 1),
            positions=cut(self.positions, 1),
            spans=spans,
            first=None,
        )

    def output(self) -> torch.Tensor:
        """An uninitialised result, `[B, H, R, Dv]` stored as `[B, R, H, Dv]`."""
        batch, heads, rows, _ = self.query.shape
        return self.query.new_empty(batch, rows, heads, self.value.shape[-1]).transpose(1, 2)


def as_operator(kernel: Kernel) -> Callable[..., torch.Tensor]:
    """Wrap `kernel` to take the arguments of the schema, and to get a scale and no `first`.

    It runs without gradients, so it may write in place.
    """

    def operator(*arguments: Any, **named: Any) -> torch.Tensor:
        call = AttentionCall(*arguments, **named).of_own_keys()
        with torch.no_grad():
            return kernel(call if call.scale is not None else replace(call, scale=call.query.shape[-1] ** -0.5))

    return operator


def attention_reference(call: AttentionCall) -> torch.Tensor:
    """The definition in plain PyTorch, with the softmax in float32 or wider."""
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
    # The softmax of a row without visible keys would be NaN. A NaN in the operands is kept.
    blind = (scores == -math.inf).all(-1, keepdim=True)
    if call.sinks is not None:
        sinks = call.sinks.to(wide)[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., :tokens].masked_fill(blind, 0.0)
    return call.output().copy_((weights @ value.to(wide)).to(query.dtype))


def _fake(*arguments: Any, **named: Any) -> torch.Tensor:
    return AttentionCall(*arguments, **named).output()


implement(MOM_ATTENTION, as_operator(attention_reference), _fake)
