"""The two kernels of `tiles.py`. Imported only if Triton is installed; they have never run on a GPU."""

# Triton reads types from annotations, and takes capitalized names as constants.
from typing import Any

import triton
import triton.language as tl

_MOVING = ["rows", "tokens", "start", "window", "per_split", "batch"]


@triton.jit(do_not_specialize=_MOVING)
def attend(  # type: ignore[no-untyped-def]
    Q, K, V, PARTS, SUMS, MASKS, KEYS, SEGMENTS, POSITIONS, BOUNDS, SINKS,
    q_b, q_h, q_r, k_b, k_h, k_t, v_b, v_h, v_t, m_b, m_h, m_r, m_t, keys_b, segments_b, positions_b,
    p_s, p_b, p_h, p_r, batch, heads, rows, tokens, start, window, per_split, scale, softcap,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, TILE_D: tl.constexpr, TILE_DV: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_KEYS: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    WINDOW_OF_POSITIONS: tl.constexpr, CAPPED: tl.constexpr, HAS_KEYS: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
    HAS_POSITIONS: tl.constexpr, HAS_BOUNDS: tl.constexpr, HAS_SINKS: tl.constexpr, SPLITS: tl.constexpr,
) -> Any:  # fmt: skip
    """Compute one tile of rows against one split of keys: the result and, with several splits, its log-sum-exp."""
    split = tl.program_id(1)
    groups = heads // GROUP
    entry = (tl.program_id(2) // groups).to(tl.int64)
    group = (tl.program_id(2) % groups).to(tl.int64)
    tile = tl.program_id(0) * TILE_ROWS
    own = tile + tl.arange(0, TILE_ROWS)
    row = own // GROUP
    head = group * GROUP + own % GROUP
    there = row < rows
    at = start + row

    low = split * per_split
    high = tl.minimum(tokens, low + per_split)
    if CAUSAL:
        high = tl.minimum(high, start + tl.minimum(rows - 1, (tile + TILE_ROWS - 1) // GROUP) + 1)
    if WINDOW:
        low = tl.maximum(low, start + tile // GROUP - window + 1)
    if HAS_BOUNDS:
        low = tl.maximum(low, tl.load(BOUNDS + 2 * entry))
        high = tl.minimum(high, tl.load(BOUNDS + 2 * entry + 1))

    channel = tl.arange(0, TILE_D)
    out_channel = tl.arange(0, TILE_DV)
    q_at = Q + entry * q_b + head[:, None] * q_h + row[:, None].to(tl.int64) * q_r + channel[None, :]
    q = tl.load(q_at, mask=there[:, None] & (channel[None, :] < D), other=0.0)
    largest = tl.full([TILE_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([TILE_ROWS], tl.float32)
    made = tl.zeros([TILE_ROWS, TILE_DV], tl.float32)
    if HAS_SEGMENTS:
        own_segment = tl.load(SEGMENTS + entry * segments_b + at, mask=there, other=0)
    if HAS_POSITIONS:
        own_position = tl.load(POSITIONS + entry * positions_b + at, mask=there, other=0)

    # Offsets within a tile have 32 bits: a pointer per element would take half of the registers.
    step = tl.arange(0, TILE_KEYS)
    k_step = step[None, :] * k_t + channel[:, None]
    v_step = step[:, None] * v_t + out_channel[None, :]
    m_step = (own // GROUP - tile // GROUP)[:, None] * m_r + (own % GROUP)[:, None] * m_h + step[None, :] * m_t
    far = low.to(tl.int64)
    k_base = K + entry * k_b + group * k_h + far * k_t
    v_base = V + entry * v_b + group * v_h + far * v_t
    m_base = MASKS + entry * m_b + group * GROUP * m_h + (tile // GROUP).to(tl.int64) * m_r + far * m_t

    for first in range(low, high, TILE_KEYS):
        token = first + step
        near = token < high
        k_near, v_near = near[None, :], near[:, None]
        if TILE_D != D:
            k_near = k_near & (channel[:, None] < D)
        if TILE_DV != DV:
            v_near = v_near & (out_channel[None, :] < DV)
        k = tl.load(k_base + k_step, mask=k_near, other=0.0)
        scores = tl.dot(q, k, input_precision="ieee") * scale
        if CAPPED:
            scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
        seen = near[None, :] & there[:, None]
        if CAUSAL:
            seen = seen & (token[None, :] <= at[:, None])
        if WINDOW:
            seen = seen & (token[None, :] > at[:, None] - window)
        if HAS_KEYS:
            seen = seen & (tl.load(KEYS + entry * keys_b + token, mask=near, other=0) != 0)[None, :]
        if HAS_SEGMENTS:
            segment = tl.load(SEGMENTS + entry * segments_b + token, mask=near, other=0)
            seen = seen & (segment[None, :] == own_segment[:, None])
        if HAS_POSITIONS:
            position = tl.load(POSITIONS + entry * positions_b + token, mask=near, other=0)
            ahead = own_position[:, None] - position[None, :]
            seen = seen & (ahead >= 0)
            if WINDOW_OF_POSITIONS:
                seen = seen & (ahead < window)
        if MASK:
            masked = tl.load(m_base + m_step, mask=seen, other=0)
            if MASK == 1:
                seen = seen & (masked != 0)
            else:
                scores = scores + masked.to(tl.float32)
        scores = tl.where(seen, scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        # A row that has seen no key yet gets exp(-inf), not exp(NaN).
        base = tl.where(larger == float("-inf"), 0.0, larger)
        weights = tl.exp(scores - base[:, None])
        shrunk = tl.exp(largest - base)
        v = tl.load(v_base + v_step, mask=v_near, other=0.0)
        total = total * shrunk + tl.sum(weights, 1)
        made = made * shrunk[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        largest = larger
        k_base += TILE_KEYS * k_t
        v_base += TILE_KEYS * v_t
        m_base += TILE_KEYS * m_t

    log_sum = tl.where(total > 0.0, largest + tl.log(tl.where(total > 0.0, total, 1.0)), float("-inf"))
    made = made / tl.where(total == 0.0, 1.0, total)[:, None]
    if SPLITS > 1:
        sums_at = SUMS + ((split * batch + entry) * heads + head) * rows + row
        tl.store(sums_at, log_sum, mask=there)
    elif HAS_SINKS:
        sink = tl.load(SINKS + head, mask=there, other=0.0).to(tl.float32)
        made = made * tl.sigmoid(log_sum - sink)[:, None]
    p_at = PARTS + split.to(tl.int64) * p_s + entry * p_b + head[:, None] * p_h + row[:, None].to(tl.int64) * p_r
    inside = there[:, None] & (out_channel[None, :] < DV)
    tl.store(p_at + out_channel[None, :], made.to(PARTS.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["splits", "batch", "rows"])
def combine(  # type: ignore[no-untyped-def]
    PARTS, SUMS, OUT, SINKS, splits, batch, heads, rows, channels, o_b, o_h, o_r,
    HAS_SINKS: tl.constexpr, SPLITS: tl.constexpr, CHANNELS: tl.constexpr,
) -> Any:  # fmt: skip
    """Merge one row of a head: the mean of parts `[splits, B, R, H, Dv]`, weighted by sums `[splits, B, H, R]`."""
    row = tl.program_id(0).to(tl.int64)
    entry = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    split = tl.arange(0, SPLITS)
    channel = tl.arange(0, CHANNELS)
    there = split < splits
    sums = tl.load(
        SUMS + ((split * batch + entry) * heads + head) * rows + row, mask=there, other=float("-inf")
    )  # fmt: skip
    largest = tl.max(sums, 0)
    weights = tl.exp(sums - tl.where(largest == float("-inf"), 0.0, largest))
    total = tl.sum(weights, 0)
    part_at = PARTS + (((split * batch + entry) * rows + row) * heads + head)[:, None] * channels + channel[None, :]
    parts = tl.load(part_at, mask=there[:, None] & (channel[None, :] < channels), other=0.0)
    made = tl.sum(parts * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    if HAS_SINKS:
        log_sum = tl.where(total > 0.0, largest + tl.log(tl.where(total > 0.0, total, 1.0)), float("-inf"))
        made = made * tl.sigmoid(log_sum - tl.load(SINKS + head).to(tl.float32))
    out_at = OUT + entry * o_b + head.to(tl.int64) * o_h + row * o_r + channel
    tl.store(out_at, made.to(OUT.dtype.element_ty), mask=channel < channels)
