"""From the options to a place for keys and values: host memory or files, and how many layers stay on the device."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import sympy
import torch
from torch import fx

from mom_compile.config import Options
from mom_compile.memory.attention import most_of_attention
from mom_compile.memory.place import KVPlace
from mom_compile.memory.residency import Needed, Residency
from mom_compile.report.record import HEADROOM, ForLong
from mom_compile.runtime.host.engine_cuda import pin_for
from mom_compile.runtime.host.placement import MEMORY, TIERS, Placement
from mom_passes.graph.edit import compute_device
from mom_passes.graph.sizes import count_hint
from mom_passes.ops.transfers import ARRIVING, FETCH, FETCH_START
from mom_passes.program.memory import Leaving, leaving
from mom_passes.program.rewritten import Rewritten

#: Of a device, what is left to what nobody counts: one part in so many, but not less than that many bytes. The
#: allocator rounds up and its segments have holes, cuBLAS keeps a workspace for each stream, and kernels are loaded.
MARGIN_SHARE, LEAST_MARGIN = 32, 256 << 20


def offloads(options: Options, device: torch.device) -> bool:
    """Whether keys and values may leave at all. A CPU's memory is the host's: "auto" needs a budget to leave it."""
    if options.kv_offload == "auto":
        return device.type != "cpu" or options.memory_budget is not None
    return bool(options.kv_offload)


def fits_for_long(rewritten: Rewritten, options: Options, static: Collection[str]) -> ForLong | None:
    """Whether "auto" leaves a graph without loops to stock Inductor; None where that is no question.

    Between loops copies cost nothing. A decode step that moves layers out when they no longer fit is cut at each of
    them, which costs time at every step; if anything is on the host already, it has to be.
    """
    gm, plan = rewritten.gm, rewritten.plan
    if options.kv_offload != "auto" or rewritten.no_loops is None:
        return None
    values = leaving(plan)
    if not values or any(node.target in (FETCH, FETCH_START) for node in gm.graph.nodes):
        return None
    kept = sum(rewritten.memory.number(plan.storages[value].bytes) for value in values)
    on_device = kept + 2 * kept // _layers(values.values())
    device = compute_device(gm)
    weights = _static_bytes(gm, static, device)
    return ForLong(weights + HEADROOM * on_device, weights, budget_of(options, device, weights))


def kv_place(rewritten: Rewritten, options: Options, static: Collection[str]) -> KVPlace:
    """Where the keys and values of a rewritten graph go, by what its program needs of the device."""
    device = compute_device(rewritten.gm)
    values = leaving(rewritten.plan).values()
    residency = None
    if options.kv_offload == "auto" and values:
        weights = _static_bytes(rewritten.gm, static, device)
        beside = most_of_attention(rewritten.plan) if device.type == "cuda" else sympy.S.Zero
        needed = Needed.by(rewritten.memory, beside)
        residency = Residency(budget_of(options, device, weights), weights, needed, _layers(values))
    return KVPlace(device, placement_of(options, device), residency)


def _layers(values: Collection[Leaving]) -> int:
    return 1 + max(value.layer for value in values)


def placement_of(options: Options, device: torch.device) -> Placement:
    """Where new stores of a device's keys and values go."""
    tier = str(options.kv_offload) if options.kv_offload in TIERS else MEMORY
    folder = None if options.kv_dir is None else Path(options.kv_dir)
    return Placement(tier, folder, pin_for(device) if device.type == "cuda" else None)


def available_bytes(device: torch.device, weights: int) -> int:
    """What a graph may use of a CUDA device for everything, `weights` that are there already included:

        free + (reserved - allocated) + weights - margin

    What PyTorch has reserved and not handed out is as good as free. What it has handed out is not: beside our weights
    that is other models, other caches and the caller's tensors.
    """
    free, total = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + cached + weights - max(LEAST_MARGIN, total // MARGIN_SHARE))


def budget_of(options: Options, device: torch.device, weights: int) -> int:
    """Bytes of the device for everything: those asked for, or those that are to be had."""
    return available_bytes(device, weights) if options.budget_bytes is None else options.budget_bytes


def _static_bytes(gm: fx.GraphModule, static: Collection[str], device: torch.device) -> int:
    """Parameters and buffers on the device. What is read by transfers is on the host, though a CPU's is that, too."""
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder" and n.name in static]
    values = [n.meta["val"] for n in inputs if not (n.users and all(user.target in ARRIVING for user in n.users))]
    return sum(count_hint(value.shape) * value.element_size() for value in values if value.device == device)
