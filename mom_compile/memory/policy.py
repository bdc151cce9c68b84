"""From the options to a place for keys and values: host memory or files, and how many layers stay on the device."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from torch import fx

from mom_compile.config import Options
from mom_compile.memory.choice import RowsOf
from mom_compile.memory.choose_rows import RowRule
from mom_compile.memory.device_bytes import budget_of, static_bytes
from mom_compile.memory.layer_rows import properties_of, row_rule, settle_rows, why
from mom_compile.memory.make_choice import captured_sizes, make_choice
from mom_compile.memory.place import KVPlace
from mom_compile.memory.refusal import MemoryBudgetError, below_weights
from mom_compile.report.record import HEADROOM, ForLong
from mom_compile.runtime.host.engine_cuda import pin_for
from mom_compile.runtime.host.placement import MEMORY, TIERS, Placement
from mom_passes.graph.edit import compute_device
from mom_passes.loops.loop import loop_nodes
from mom_passes.ops.transfers import FETCH, FETCH_START
from mom_passes.program.memory import leaving
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
    layers = 1 + max(value.layer for value in values.values())
    on_device = kept + 2 * kept // layers
    device = compute_device(gm)
    weights = static_bytes(gm, static, device)
    return ForLong(weights + HEADROOM * on_device, weights, budget_of(options, device, weights))


def kv_place(rewritten: Rewritten, options: Options, static: Collection[str], rule: RowRule | None = None) -> KVPlace:
    """Where the keys and values of a rewritten graph go, and what each of its runs chooses by what it needs of the
    device; `rule` says how many rows its mini-sequences have, None: as many as they have.

    Raises `MemoryBudgetError` where a budget was asked for and a run of the captured sizes cannot keep it.
    """
    choice, numbers = make_choice(rewritten, options, static, rule)
    if choice.budget is not None and choice.budget.asked:
        choice.at(captured_sizes(choice, rewritten.memory))
    by_run = rule is not None and (bool(choice.footprint.symbols) or choice.budget is not None)
    rows = {node: RowsOf(choice, number) for node, number in numbers.items()} if by_run else {}
    device = compute_device(rewritten.gm)
    graphs = options.decode_cuda_graphs and rewritten.no_loops is not None
    return KVPlace(device, placement_of(options, device), choice, rows, graphs)


def rule_for(rewritten: Rewritten, options: Options, static: Collection[str]) -> RowRule | None:
    """What says how many rows a graph's loops have; None where it has none, or the user has said so."""
    if rewritten.no_loops is not None or options.mini_seq_len != "auto" or not loop_nodes(rewritten.gm):
        return None
    device = compute_device(rewritten.gm)
    return row_rule(rewritten, device.type, properties_of(device), static)


def with_chosen_rows(
    rewritten: Rewritten, options: Options, static: Collection[str]
) -> tuple[Rewritten, str, int | None]:
    """A graph with the rows that are chosen for a run of its captured sizes, and why in words; and how many tokens it
    has, where none of its loops has more than one mini-sequence and it is better off without."""
    rule = rule_for(rewritten, options, static)
    if rule is None:
        return rewritten, "", None
    choice, numbers = make_choice(rewritten, options, static, rule)
    sizes = captured_sizes(choice, rewritten.memory)
    chosen, asked = choice.best(sizes).rows, choice.footprint.rows(sizes)
    lengths = {node: module.loop.length for node, module in loop_nodes(rewritten.gm)}
    literal = {node: length for node, length in lengths.items() if isinstance(length, int)}
    whole = literal.keys() == lengths.keys() and all(n <= chosen[numbers[node]] for node, n in literal.items())
    settled = settle_rows(rewritten, {node: chosen[number] for node, number in numbers.items()})
    said = why(rewritten, properties_of(compute_device(rewritten.gm)), static, chosen)
    if chosen != asked:
        said = ", ".join(filter(None, [said, "fewer for memory_budget"]))
    return settled, said, max(literal.values()) if whole else None


def refused(rewritten: Rewritten, options: Options, static: Collection[str]) -> str:
    """Why a run of the captured sizes cannot keep the budget that was asked for; empty where it can."""
    try:
        check_weights(rewritten.gm, options, static)
        kv_place(rewritten, options, static, rule_for(rewritten, options, static))
    except MemoryBudgetError as error:
        return str(error)
    return ""


def check_weights(gm: fx.GraphModule, options: Options, static: Collection[str]) -> None:
    """Raises `MemoryBudgetError` where a budget was asked for that a graph's weights alone do not fit into."""
    weights, budget = static_bytes(gm, static, compute_device(gm)), options.budget_bytes
    if budget is not None and budget < weights:
        raise MemoryBudgetError(below_weights(budget, weights))


def placement_of(options: Options, device: torch.device) -> Placement:
    """Where new stores of a device's keys and values go."""
    tier = str(options.kv_offload) if options.kv_offload in TIERS else MEMORY
    folder = None if options.kv_dir is None else Path(options.kv_dir)
    return Placement(tier, folder, pin_for(device) if device.type == "cuda" else None)
