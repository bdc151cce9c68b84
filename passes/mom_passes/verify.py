"""Invariants of graphs and loops, checked after every pass. A violation is a bug in a pass; the caller falls back.

level 1   always: reads the graph and its types
level 2   in tests: also runs operators and loop bodies on fake tensors
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mom_passes.errors import PassError
from mom_passes.graph.edit import fake_value, strides_differ
from mom_passes.graph.meta import meta_value
from mom_passes.graph.values import returned_values, returns_a_tensor, returns_nothing
from mom_passes.graph.writes import read_after_write, written_inputs
from mom_passes.loops import laws
from mom_passes.loops.loop import Loop, loop_nodes
from mom_passes.loops.ports import TensorType
from mom_passes.ops.transfers import APPEND, FETCH_START, FETCH_WAIT, OFFLOAD

#: An operator that is replaced may check its arguments: `masked_scatter` counts the elements of its source.
ASSERTION = str(torch.ops.aten._assert_async.msg)


@dataclass(frozen=True)
class Contract:
    """The interface of a graph.

    inputs     names of the placeholders
    outputs    types of the results; the Python type of a result that is not a tensor
    written    names of the inputs that it writes to, one for each write
    effects    the operators that return nothing (assertions), in order; a pass may add assertions
    """

    inputs: tuple[str, ...]
    outputs: tuple[TensorType | type, ...]
    written: tuple[str, ...] = ()
    effects: tuple[str, ...] = ()

    @staticmethod
    def of(gm: fx.GraphModule) -> Contract:
        inputs = tuple(node.name for node in gm.graph.nodes if node.op == "placeholder")
        return Contract(inputs, tuple(map(_type_of, returned_values(gm.graph))), written_inputs(gm), _effects_of(gm))


def _effects_of(gm: fx.GraphModule) -> tuple[str, ...]:
    return tuple(str(node.target) for node in gm.graph.nodes if returns_nothing(node))


def _with_assertions(effects: tuple[str, ...], wanted: tuple[str, ...]) -> bool:
    """Whether operators are the wanted ones in order, apart from assertions that a pass added."""
    left = list(wanted)
    for effect in effects:
        if left and effect == left[0]:
            del left[0]
        elif effect != ASSERTION:
            return False
    return not left


def _type_of(output: Any) -> TensorType | type:
    value = meta_value(output) if isinstance(output, fx.Node) else output
    return TensorType.of(value) if isinstance(value, torch.Tensor) else type(value)


# --- laws of graphs: None, or a message ---


def is_well_formed(gm: fx.GraphModule) -> str | None:
    """Every node is defined before its uses and every target exists."""
    try:
        gm.graph.lint()
    except RuntimeError as error:
        return f"malformed graph: {error}"
    return None


def is_typed(gm: fx.GraphModule) -> str | None:
    """Every operator that returns tensors has a recorded value."""
    for node in gm.graph.nodes:
        if node.op == "call_function" and "val" not in node.meta and returns_a_tensor(node):
            return f"{node.name} ({node.target}) has no recorded value"
    return None


def host_values_are_moved_only(gm: fx.GraphModule) -> str | None:
    """Host values are read only by transfers, or returned; every copy to the device is waited for once."""
    for node in gm.graph.nodes:
        readers = [user.target for user in node.users if user.target is not FETCH_START]
        if node.target is FETCH_START and readers != [FETCH_WAIT]:
            return f"{node.name} is read before its copy ends, or its copy is never waited for"
        if node.target in (APPEND, OFFLOAD) and any(user.op != "output" for user in node.users):
            return f"{node.name} is on the host and read on the device"
    return None


def keeps(contract: Contract, gm: fx.GraphModule) -> str | None:
    """The graph has the interface of the contract. Only the device of a value moved to the host may differ."""
    inputs = tuple(node.name for node in gm.graph.nodes if node.op == "placeholder")
    if inputs != contract.inputs:
        return f"the graph takes {list(inputs)} in place of {list(contract.inputs)}"
    written = written_inputs(gm)
    if written != contract.written:
        return f"the graph writes to {list(written)} in place of {list(contract.written)}"
    effects = _effects_of(gm)
    if not _with_assertions(effects, contract.effects):
        return f"the graph calls {list(effects)} for their effects in place of {list(contract.effects)}"
    outputs = returned_values(gm.graph)
    if len(outputs) != len(contract.outputs):
        return f"the graph returns {len(outputs)} values in place of {len(contract.outputs)}"
    for i, (output, wanted) in enumerate(zip(outputs, contract.outputs, strict=True)):
        found = _type_of(output)
        if not (isinstance(found, TensorType) and isinstance(wanted, TensorType)):
            wrong = None if found == wanted else f"is {found} in place of {wanted}"
        else:
            left = isinstance(output, fx.Node) and output.target in (APPEND, OFFLOAD)
            wrong = wanted.other_than(TensorType(found.shape, found.dtype, wanted.device) if left else found)
        if wrong is not None:
            return f"output {i} ({output}) {wrong}"
    return None


def values_are_as_computed(gm: fx.GraphModule) -> str | None:
    """Every recorded value is what its operator returns, strides included. Slow: for tests."""
    for node in gm.graph.nodes:
        if node.op != "call_function" or not isinstance(meta_value(node), torch.Tensor):
            continue
        claimed, given = meta_value(node), fake_value(node)
        wrong = TensorType.of(claimed).difference(given)
        if wrong is None and strides_differ(claimed, given):
            wrong = f"has strides {list(given.stride())} in place of {list(claimed.stride())}"
        if wrong is not None:
            return f"{node.name} {wrong}"
    return None


GraphLaw = Callable[[fx.GraphModule], str | None]
LoopLaw = Callable[[fx.Node, Loop], str | None]

OF_GRAPHS: tuple[GraphLaw, ...] = (is_well_formed, host_values_are_moved_only, is_typed, read_after_write)
#: These may rely on all other laws.
OF_GRAPHS_IN_TESTS: tuple[GraphLaw, ...] = (values_are_as_computed,)
#: Each may rely on the laws before it.
OF_BODIES: tuple[LoopLaw, ...] = (
    laws.body_takes_its_inputs,
    laws.body_is_typed,
    laws.body_is_good_for_all_lengths,
)
OF_LOOPS: tuple[LoopLaw, ...] = (
    laws.operands_fit_their_ports,
    laws.results_fit_their_ports,
    laws.overwrites_what_is_dead,
)
OF_LOOPS_IN_TESTS: tuple[LoopLaw, ...] = (laws.body_computes_its_types,)


def verify(
    gm: fx.GraphModule,
    contract: Contract | None = None,
    *,
    level: int = 1,
    known: set[fx.GraphModule] | None = None,
) -> None:
    """Check the laws of a graph and its loops.

    Parameters
    ----------
    contract
        The interface of the captured graph, if it is to be compared.
    level
        1, or 2 for the slow laws too.
    known
        Loop bodies that were verified and have not changed since. Verified bodies are added.

    Raises
    ------
    PassError
        If a law does not hold.
    """
    for graph_law in OF_GRAPHS:
        _raise(graph_law(gm))
    if contract is not None:
        _raise(keeps(contract, gm))
    for node, module in loop_nodes(gm):
        of_bodies = OF_BODIES if known is None or module.body not in known else ()
        for loop_law in (*of_bodies, *OF_LOOPS, *(OF_LOOPS_IN_TESTS if level > 1 else ())):
            wrong = loop_law(node, module.loop)
            _raise(None if wrong is None else f"{node.target}: {wrong}")
        if known is not None:
            known.add(module.body)
    for graph_law in OF_GRAPHS_IN_TESTS if level > 1 else ():
        _raise(graph_law(gm))


def _raise(wrong: str | None) -> None:
    if wrong is not None:
        raise PassError(wrong)
