"""From copy operators between compiled pieces to steps of the running program."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from mom_compile.memory.choice import Stays
from mom_compile.memory.decide import Decision
from mom_compile.runtime.copy_steps import Append, FetchChosen, FetchRows, FetchStart, FetchWait, Offload
from mom_compile.runtime.extend import Extend
from mom_passes.graph.meta import meta_value
from mom_passes.graph.sizes import expr
from mom_passes.ops.transfers import APPEND, EXTEND, FETCH_CHOSEN, FETCH_ROWS, FETCH_START, FETCH_WAIT, OFFLOAD
from mom_passes.program.memory import Leaving

#: The number of values for which host memory is prepared while a layer computes: its keys and its values.
AHEAD = 2


def copy_step(
    node: fx.Node, place: Decision, values: Mapping[fx.Node, Leaving], sizes: Sequence[fx.Node]
) -> tuple[Callable[..., Any], list[Any]]:
    """Return the step of a copy operator, with its arguments.

    Parameters
    ----------
    values
        The keys and values that are offloaded as a whole, by their `offload` node.
    sizes
        The nodes of the graph's sizes by which a run decides whether they are.
    """
    if node.target is FETCH_START:
        host, rows, dim, device, *over = node.args
        return FetchStart(dim, device), [host, rows, *over]  # type: ignore[arg-type]
    if node.target in (FETCH_ROWS, FETCH_CHOSEN):
        host, which, device = node.args
        step = FetchRows if node.target is FETCH_ROWS else FetchChosen
        return step(device), [host, which]  # type: ignore[arg-type]
    if node.target is FETCH_WAIT:
        buffer, new, dim = node.args
        return FetchWait(dim), [buffer, new]  # type: ignore[arg-type]
    if node.target is EXTEND:
        past, new, dim = node.args
        return Extend(dim), [past, new]  # type: ignore[arg-type]
    if node.target is APPEND:
        host, new, dim, first = node.args
        return Append(dim, place.device, place.placement), [host, new, first]  # type: ignore[arg-type]
    assert node.target is OFFLOAD
    value, dim, first, layer = node.args
    stays = None
    if place.choice is not None and place.choice.layers:
        own = values[node].bytes_per_token
        of_layer = sum(other.bytes_per_token for other in values.values() if other.layer == layer)
        stays = Stays(place.choice, values[node].layer, of_layer, own)
    ahead = min(AHEAD, _later_of_same_type(node))
    asked = sizes if stays is not None else ()
    return Offload(dim, place.device, place.placement, stays, ahead), [value, first, *asked]  # type: ignore[arg-type]


def _later_of_same_type(node: fx.Node) -> int:
    """Return how many values of the same type are offloaded after this one."""
    leaving = list(node.graph.find_nodes(op="call_function", target=OFFLOAD))
    return sum(_type(other) == _type(node) for other in leaving[leaving.index(node) + 1 :])


def _type(node: fx.Node) -> tuple[object, ...]:
    value = meta_value(node)
    return value.dtype, tuple(expr(size) for size in value.shape)
