"""Replace convolutions with one position in each entry of the batch by matrix products, whose rows are the entries.

The patches of an image or a video are such entries, and the tokens of a vision tower. No rule computes a convolution on
some entries, as its batch is no token dimension elsewhere.

Before:  y = convolution(x, w, bias)                        x [N, C, T, P, P], w [O, C, T, P, P]: y [N, O, 1, 1, 1]
After:   y = view(addmm(bias, view(x, [N, -1]), view(w, [O, -1]).t()), [N, O, 1, 1, 1])
"""

from __future__ import annotations

from torch import fx

from mom_passes.graph.arguments import argument, argument_node, aten
from mom_passes.graph.edit import emit, emit_view
from mom_passes.graph.sizes import all_same, is_one, product
from mom_passes.graph.values import value_of


def patch_products(gm: fx.GraphModule) -> list[fx.Node]:
    """Replace such convolutions in place. Return the new values."""
    convolutions = gm.graph.find_nodes(op="call_function", target=aten.convolution.default)
    replaced = [_replace(node) for node in convolutions if _has_one_position(node)]
    if replaced:
        gm.graph.eliminate_dead_code()
        gm.recompile()
    return replaced


def _has_one_position(node: fx.Node) -> bool:
    """Return whether the kernel of a convolution is as large as its operand."""
    x, weight = (value_of(argument(node, name)) for name in ("input", "weight"))
    if argument(node, "transposed") or argument(node, "groups") != 1 or any(argument(node, "padding")):
        return False
    # One row is no token dimension: the convolution of a whole image with a kernel of its size.
    return all_same(x.shape[1:], weight.shape[1:]) and not is_one(x.shape[0])


def _replace(node: fx.Node) -> fx.Node:
    x, weight, bias = argument_node(node, "input"), argument_node(node, "weight"), argument(node, "bias")
    entries, (channels, *kernel) = value_of(x).shape[0], value_of(weight).shape
    width = product(kernel)
    with node.graph.inserting_before(node):
        rows = emit_view(x, [entries, width], node)
        columns = emit(node.graph, aten.permute.default, (emit_view(weight, [channels, width], node), [1, 0]))
        operands = (rows, columns)
        target = aten.mm.default if bias is None else aten.addmm.default
        made = emit(node.graph, target, operands if bias is None else (bias, *operands))
        new = emit_view(made, value_of(node).shape, node)
    new.meta = {**node.meta, "val": new.meta["val"]}
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
    return new
