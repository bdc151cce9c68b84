"""From the options to a place for keys and values: host memory or files, and how many layers stay on the device."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from torch import fx

from mom_compile.config import Options
from mom_compile.memory.place import KVPlace
from mom_compile.memory.residency import Needed, Residency
from mom_compile.report.record import HEADROOM, ForLong
from mom_compile.runtime.host.engine_cuda import pin_for
from mom_compile.runtime.host.placement import MEMORY, TIERS, Placement
from mom_passes.graph.edit import compute_device
from mom_passes.graph.sizes import count_hint
from mom_passes.ops.transfers import FETCH, FETCH_START
from mom_passes.program.memory import Leaving, leaving
from mom_passes.program.rewritten import Rewritten


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
    needed = _static_bytes(gm, static) + HEADROOM * on_device
    return ForLong(needed, budget_of(options, compute_device(gm)))


def kv_place(rewritten: Rewritten, options: Options, static: Collection[str]) -> KVPlace:
    """Where the keys and values of a rewritten graph go, by what its program needs of the device."""
    device = compute_device(rewritten.gm)
    values = leaving(rewritten.plan).values()
    residency = None
    if options.kv_offload == "auto" and values:
        budget = budget_of(options, device)
        weights, needed = _static_bytes(rewritten.gm, static), Needed.by(rewritten.memory)
        residency = Residency(budget, weights, needed, _layers(values))
    return KVPlace(device, placement_of(options, device), residency)


def _layers(values: Collection[Leaving]) -> int:
    return 1 + max(value.layer for value in values)


def placement_of(options: Options, device: torch.device) -> Placement:
    """Where new stores of a device's keys and values go."""
    tier = str(options.kv_offload) if options.kv_offload in TIERS else MEMORY
    folder = None if options.kv_dir is None else Path(options.kv_dir)
    return Placement(tier, folder, pin_for(device) if device.type == "cuda" else None)


def budget_of(options: Options, device: torch.device) -> int:
    """Bytes of a device that may be used: those that the user gives, or what is free now."""
    return options.budget_bytes or _free_bytes(device)


def _free_bytes(device: torch.device) -> int:
    """What this process may use of a device: what is free, and what PyTorch has reserved already."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device))


def _static_bytes(gm: fx.GraphModule, static: Collection[str]) -> int:
    """Parameters and buffers."""
    values = [n.meta["val"] for n in gm.graph.nodes if n.op == "placeholder" and n.name in static]
    return sum(count_hint(value.shape) * value.element_size() for value in values)
