"""Replace each causal convolution, however it is padded, and each of its states that a cache keeps by one operator.

Before:  y = convolution(x, w, padding=K-1)[..., :S]        y = convolution(pad(x, (K-1, 0)), w)
After:   y = causal_conv1d(x, w)

Before:  state = pad(x, (K - S, 0))                         the last K columns, with zeros before them if S < K
         state = x[..., -K:]                                of the operand of a causal convolution
After:   state = last_rows(zeros(B, C, K), x)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from mom_passes.graph.arguments import argument, aten, axis
from mom_passes.graph.edit import fake_value
from mom_passes.graph.sizes import hint, same
from mom_passes.graph.values import value_of
from mom_passes.ops.convolution import CAUSAL_CONV1D, rows_ahead
from mom_passes.tokens.continued_convolutions import continue_convolutions, takes_last
from mom_passes.tokens.last_rows import MOST_ROWS, emit_last_rows


def causal_convolutions(gm: fx.GraphModule) -> list[fx.Node]:
    """Replace causal convolutions and their states in place. Return the new calls."""
    convolutions = gm.graph.find_nodes(op="call_function", target=aten.convolution.default)
    pads = gm.graph.find_nodes(op="call_function", target=aten.constant_pad_nd.default)
    found = [node for node in map(_replace_convolution, convolutions) if node is not None]
    replaced = found + continue_convolutions(gm)
    slices = dict.fromkeys(user for node in found for user in argument(node, "x").users)
    states = [*map(_replace_padded_state, pads), *map(_replace_sliced_state, slices)]
    replaced += [node for node in states if node is not None]
    if replaced:
        gm.graph.eliminate_dead_code()
        gm.recompile()
    return replaced


def _replace_convolution(node: fx.Node) -> fx.Node | None:
    """Replace a convolution that pads before the first row only, or pads both sides and drops the rows at the end."""
    x, weight = argument(node, "input"), argument(node, "weight")
    if value_of(node).dim() != 3 or argument(node, "transposed") or any(n != 1 for n in argument(node, "stride")):
        return None
    (dilation,), (padding,) = argument(node, "dilation"), argument(node, "padding")
    ahead = rows_ahead(value_of(weight), dilation)
    if padding == ahead == 0:
        source, results = x, [node]
    elif padding == 0 and _zeros_ahead(x) == ahead:
        source, results = argument(x, "self"), [node]
    elif padding == ahead:
        source, results = x, list(node.users)
        if not all(_takes_first_rows(user, value_of(x).shape[-1]) for user in results):
            return None
    else:
        return None
    with node.graph.inserting_before(node):
        args = (source, weight, argument(node, "bias"), dilation, argument(node, "groups"))
        return _substitute(results, node.graph.call_function(CAUSAL_CONV1D, args))


def _zeros_ahead(node: fx.Node) -> Any:
    """Return how many zero columns a pad adds before the first column, None if it adds others or is no such pad."""
    if node.target is not aten.constant_pad_nd.default or argument(node, "value") != 0:
        return None
    ahead, *others = argument(node, "pad")
    return ahead if all(type(amount) is int and amount == 0 for amount in others) else None


def _takes_first_rows(user: fx.Node, length: Any) -> bool:
    """Whether a slice keeps the first `length` rows of a convolution, so that none reads padding after the last row."""
    if user.target is not aten.slice.Tensor or axis(argument(user, "dim"), 3) != 2 or argument(user, "step") != 1:
        return False
    return argument(user, "start") in (None, 0) and same(value_of(user).shape[-1], length)


def _replace_padded_state(node: fx.Node) -> fx.Node | None:
    """Replace a pad that crops a value to its last few columns, or adds zeros before them if there are fewer."""
    ahead = _zeros_ahead(node)
    if ahead is None or (isinstance(ahead, int) and ahead >= 0):
        return None
    # A pad by a symbolic size is a state for every length, also if the captured prompt is short.
    return _replace_state(node, for_all_lengths=not isinstance(ahead, int))


def _replace_sliced_state(node: fx.Node) -> fx.Node | None:
    """Replace a slice that takes the last few columns of the operand of a convolution."""
    return _replace_state(node) if takes_last(node) else None


def _replace_state(node: fx.Node, *, for_all_lengths: bool = False) -> fx.Node | None:
    """Replace a value by the last rows of its operand, if these are few and only a part of it."""
    source, shape = argument(node, "self"), value_of(node).shape
    if not isinstance(shape[-1], int) or not 0 < shape[-1] <= MOST_ROWS:
        return None
    if not for_all_lengths and 2 * shape[-1] > hint(value_of(source).shape[-1]):
        return None
    return _substitute([node], emit_last_rows(node, source, len(shape) - 1, shape))


def _substitute(results: Sequence[fx.Node], new: fx.Node) -> fx.Node:
    """Replace values by a new call of the same shape. Return the call."""
    new.meta = {**results[0].meta, "val": fake_value(new)}
    for result in results:
        result.replace_all_uses_with(new)
    return new
