"""A Triton attention kernel for calls that PyTorch's kernels do not support well. It has never run on a GPU.

`tests/no_gpu` compiles it for sm_80, sm_90 and sm_100, and runs it in Triton's interpreter against the definition.

    capped scores                   not supported by PyTorch's kernels
    masks that are data             PyTorch's kernel requires an additive mask, expanded and aligned
    a range of keys for each entry  left padding is not read, with one launch for the batch
    few rows, many keys             keys are split, and the parts merged

Terms
-----
tile    `TILE_ROWS` rows of a program against `TILE_KEYS` keys at a time. A row of a tile is a row of one query head.
        Heads that share keys are rows of one tile, so that keys are read once for all of them.
split   A program's share of the keys if there are few rows; `combine` merges the splits.

Triton comes with PyTorch's CUDA builds. The kernel is not used if Triton is missing, if MOM_COMPILE_TILES=0, or on a
device where a launch has failed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import torch

from mom_compile.notices import warn_once
from mom_passes.ops.attention import AttentionCall

AVAILABLE = importlib.util.find_spec("triton") is not None and os.environ.get("MOM_COMPILE_TILES") != "0"

#: Why the kernel could not be launched, by device. Other kernels are used there.
REFUSED: dict[torch.device, str] = {}

#: Pipeline stages for loading keys and values.
STAGES = 2
#: The most splits of a tile, and the fewest keys of a split.
MOST_SPLITS, FEWEST_KEYS = 64, 256
#: The most channels of a head: a tile of keys and one of values are in shared memory.
MOST_CHANNELS = 256


def takes_tiles(call: AttentionCall) -> bool:
    """Dtypes of tensor cores or float32, Ampere or later, adjacent channels."""
    tensors = (call.query, call.key, call.value)
    return (
        AVAILABLE
        and call.query.device not in REFUSED
        and torch.cuda.get_device_capability(call.query.device) >= (8, 0)
        and call.query.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and all(t.dtype == call.query.dtype and t.stride(-1) == 1 and t.shape[-1] <= MOST_CHANNELS for t in tensors)
    )


def each_its_range(call: AttentionCall) -> bool:
    """Whether each batch entry sees one range of keys, and the ranges differ."""
    spans = call.spans
    if spans is None or call.mask is not None or spans.shape[0] == 1 or spans.shape[1] != 1:
        return False
    return bool((spans >= 0).all()) and not bool((spans == spans[:1]).all())


def attention_in_tiles(call: AttentionCall) -> torch.Tensor | None:
    """Compute a whole call, `[B, H, R, Dv]`, token-major, with masks, conditions, cap and sinks.

    Returns None, with one warning, if the kernel cannot be compiled or launched on a device.
    """
    try:
        return _launched(call)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        device, reason = call.query.device, f"{type(error).__name__}: {error}"
        REFUSED[device] = reason
        text = f"the Triton attention kernel cannot be launched on {device}; other kernels are used instead: {reason}"
        warn_once(f"tiles: {device}", text)
        return None


def _launched(call: AttentionCall) -> torch.Tensor:
    from mom_compile.runtime.attention.tile_kernels import attend, combine

    result = call.output()
    batch, heads, rows, channels = result.shape
    tile, groups = tile_of(call), call.key.shape[1]
    tiles = -(-rows * (heads // groups) // tile.rows)
    splits = splits_of(tiles * batch * groups, call)
    parts = sums = result
    if splits > 1:
        parts = result.new_empty(splits, batch, rows, heads, channels, dtype=torch.float32).transpose(2, 3)
        sums = result.new_empty(splits, batch, heads, rows, dtype=torch.float32)
    with torch.cuda.device(result.device) if result.is_cuda else contextlib.nullcontext():
        attend[(tiles, splits, batch * groups)](
            *arguments(call, parts, sums, splits), **constants(call, splits), num_warps=tile.warps, num_stages=STAGES
        )
        if splits > 1:
            sinks = result if call.sinks is None else call.sinks
            combine[(rows, batch * heads)](
                parts, sums, result, sinks, splits, batch, heads, rows, channels, *result.stride()[:3],
                HAS_SINKS=call.sinks is not None, SPLITS=next_power(splits), CHANNELS=next_power(channels),
            )  # fmt: skip
    return result


def next_power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


@dataclass(frozen=True)
class Tile:
    """`TILE_ROWS`, `TILE_KEYS` and the number of warps."""

    rows: int
    keys: int
    warps: int


def tile_of(call: AttentionCall) -> Tile:
    """Return the largest tile tried that spills almost no registers, the only measure available without a GPU."""
    rows = call.rows * (call.query.shape[1] // call.key.shape[1])
    channels = max(call.query.shape[-1], call.value.shape[-1]) * (call.query.dtype.itemsize // 2)
    if rows <= 16:
        return Tile(16, 64 if channels <= 128 else 32, 8)
    if channels > 128:
        return Tile(32, 32, 8)
    return Tile(64, 32, 4 if channels <= 64 else 8)


def splits_of(programs: int, call: AttentionCall) -> int:
    """Return the number of splits of the keys: one per idle multiprocessor, with at least `FEWEST_KEYS` keys each."""
    if not call.query.is_cuda:
        return 1
    processors = torch.cuda.get_device_properties(call.query.device).multi_processor_count
    return max(1, min(processors // max(1, programs), call.tokens // FEWEST_KEYS, MOST_SPLITS))


def arguments(call: AttentionCall, parts: torch.Tensor, sums: torch.Tensor, splits: int) -> list[Any]:
    """Return the arguments of `attend`, in order. The query replaces missing tensors, which are not read."""
    query, key, value, mask = call.query, call.key, call.value, call.mask
    batch, heads, rows, _ = query.shape
    if mask is not None:
        mask = mask.expand(batch, heads, rows, call.tokens)
    bounds = bounds_of(call)
    vectors = [None if bounds is not None else one for one in (call.keys, call.segments, call.positions)]
    given = [query if one is None else one for one in (mask, *vectors, bounds, call.sinks)]
    part_strides = (parts.stride(0) if splits > 1 else 0, *parts.stride()[-4:-1])
    return [
        query, key, value, parts, sums, *given,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        *((0,) * 4 if mask is None else mask.stride()),
        *(0 if one is None or one.shape[0] == 1 else one.stride(0) for one in vectors),
        *part_strides, batch, heads, rows, call.tokens, call.start, call.window or 0,
        -(-call.tokens // splits), float(call.scale), float(call.softcap or 1.0),
    ]  # fmt: skip


def constants(call: AttentionCall, splits: int) -> dict[str, Any]:
    """Return the compile-time constants of `attend`."""
    tile = tile_of(call)
    ranged = bounds_of(call) is not None
    by_index = call.is_causal or (ranged and call.positions is not None)
    mask = 0 if call.mask is None else 1 if call.mask.dtype == torch.bool else 2
    return {
        "GROUP": call.query.shape[1] // call.key.shape[1], "D": call.query.shape[-1], "DV": call.value.shape[-1],
        "TILE_D": max(16, next_power(call.query.shape[-1])), "TILE_DV": max(16, next_power(call.value.shape[-1])),
        "TILE_ROWS": tile.rows, "TILE_KEYS": tile.keys, "MASK": mask,
        "CAUSAL": by_index, "WINDOW": call.window is not None and by_index,
        "WINDOW_OF_POSITIONS": call.window is not None and not by_index, "CAPPED": call.softcap is not None,
        "HAS_KEYS": call.keys is not None and not ranged, "HAS_SEGMENTS": call.segments is not None and not ranged,
        "HAS_POSITIONS": call.positions is not None and not ranged, "HAS_BOUNDS": ranged,
        "HAS_SINKS": call.sinks is not None, "SPLITS": splits,
    }  # fmt: skip


def bounds_of(call: AttentionCall) -> torch.Tensor | None:
    """Return the range of keys of each entry, `[B, 2]` on the device, if `mom.spans` has found one for each."""
    spans = call.spans
    if spans is None or call.mask is not None or spans.shape[1] != 1 or bool((spans < 0).any()):
        return None
    return spans[:, 0].expand(call.query.shape[0], 2).to(call.query.device, torch.int32).contiguous()
