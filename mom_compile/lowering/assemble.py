"""From calls over graph values to a runtime `Program`: numbered slots, and the step at which each slot is emptied.

A tensor's slot is emptied when the last step that reads it begins.

    step 3   mul = piece_1(k, q)      k is not read later    ->    Step(piece_1, (Slot(4), Slot(2)), (7,), dying=(4,))
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from mom_compile.lowering.pieces import Piece
from mom_compile.lowering.templates import SizeTemplate, Template
from mom_compile.memory.choice import KeepsBudget
from mom_compile.memory.decide import Decision
from mom_compile.memory.ranks import RanksAgree
from mom_compile.runtime.copy_steps import KeepWeights, Settle
from mom_compile.runtime.cuda_graphs import Replayed, may_be_recorded
from mom_compile.runtime.program import Program, Slot, Step
from mom_passes.graph.aliasing import base_of, is_mutation
from mom_passes.graph.meta import meta_value
from mom_passes.graph.sizes import expr
from mom_passes.graph.values import tensors_of
from mom_passes.ops.collectives import has_collectives
from mom_passes.ops.transfers import ARRIVING, EXTEND
from mom_passes.program import program as plans
from mom_passes.program.lives import lives
from mom_passes.program.program import Transfer
from mom_passes.torch_compat import SYMBOLIC

#: What a step calls, and its arguments: nodes of the graph, or constants.
Called = tuple[Callable[[list[Any]], Any], list[Any]]


def assemble(
    plan: plans.Program,
    calls: Sequence[Called],
    kv: Decision,
    deciding: Sequence[fx.Node],
    static_inputs: Collection[str],
) -> Program:
    """Return the program.

    Parameters
    ----------
    calls
        One for each step of the plan.
    deciding
        The nodes of the sizes by which each run chooses the layers that stay on the device.
    static_inputs
        The names of the placeholders that hold parameters and buffers.
    """
    slots, last = _slots(plan), lives(plan).last
    steps = []
    if kv.agreement is not None:
        symbols = kv.agreement.symbols
        sizes = [n for n in plan.inputs if isinstance(meta_value(n), SYMBOLIC) and expr(meta_value(n)) in symbols]
        choice = kv.choice if kv.rows else None
        given = tuple(Slot(slots[n]) for n in (*deciding, *sizes))
        steps.append(Step("ranks_agree", RanksAgree(kv.agreement, choice, len(deciding)), given, (), ()))
    if kv.is_for_each_run:
        assert kv.choice is not None
        steps.append(Step("memory_budget", KeepsBudget(kv.choice), tuple(Slot(slots[n]) for n in deciding), (), ()))
    for i, (step, (run, arguments)) in enumerate(zip(plan.steps, calls, strict=True)):
        run = _replayed(plan, step, run, arguments, kv.device, static_inputs) if kv.cuda_graphs else run
        dying = {slots[n] for n in step.ins if last[n] == i and tensors_of(n)}
        steps.append(
            Step(
                step.name,
                run,
                tuple(Slot(slots[a]) if isinstance(a, fx.Node) else a for a in arguments),
                tuple(slots[r] if r is not None and last[r] > i else None for r in step.outs),
                tuple(sorted(dying)),
            )
        )
    unread = tuple(slots[n] for n in plan.inputs if n not in last and tensors_of(n))
    outputs = tuple(Slot(slots[n]) if isinstance(n, fx.Node) else n for n in plan.outputs)
    copies = [s.node for s in plan.steps if isinstance(s, Transfer) and s.node.target is not EXTEND]
    on_host = {base_of(node.args[0]) for node in copies if node.target in ARRIVING}  # type: ignore[arg-type]
    from_host = tuple(number for number, node in enumerate(plan.inputs) if node in on_host)
    return Program(
        tuple(steps),
        len(slots),
        unread,
        outputs,
        Settle(kv.device) if copies else None,
        KeepWeights(from_host) if from_host else None,
    )


def _slots(plan: plans.Program) -> Mapping[fx.Node, int]:
    """Number all values: inputs first, then the results of each step."""
    results = (result for step in plan.steps for result in step.outs if result is not None)
    return {node: number for number, node in enumerate(dict.fromkeys([*plan.inputs, *results]))}


# --- CUDA graphs ---


def _replayed(
    plan: plans.Program,
    step: plans.Step,
    run: Callable[[list[Any]], Any],
    arguments: Sequence[Any],
    device: torch.device,
    static_inputs: Collection[str],
) -> Any:
    """Return a piece as a CUDA graph if its inputs have the same shapes in every run; otherwise `run`.

    A piece with collectives is not recorded: whether a group's backend may be captured is not known.
    """
    if not isinstance(run, Piece) or run.symbols or any(map(is_mutation, run.gm.graph.nodes)):
        return run
    if has_collectives(run.gm.graph.nodes):
        return run
    static = [base_of(node).name in static_inputs for node in arguments]
    fixed = tuple(itertools.compress(itertools.count(), static))
    if not may_be_recorded([_fixed_shape(template) for template in run.templates], fixed, device):
        return run
    read_later = _read_after_next_run(plan)
    kept = tuple(i for i, n in enumerate(step.outs) if n is not None and base_of(n) in read_later)
    return Replayed(run, device, fixed, kept)


def _read_after_next_run(plan: plans.Program) -> set[fx.Node]:
    """Return the values that the caller or a copy engine may read after the step has run again."""
    copied = (node for step in plan.steps if isinstance(step, Transfer) for node in step.ins)
    return {base_of(node) for node in (*plan.outputs, *copied) if isinstance(node, fx.Node)}


def _fixed_shape(template: Template) -> tuple[list[int], torch.dtype, torch.device] | None:
    if isinstance(template, SizeTemplate) or any(not size.is_Integer for size in (*template.shape, *template.stride)):
        return None
    return [int(size) for size in template.shape], template.dtype, template.device
