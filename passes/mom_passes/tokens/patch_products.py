"""Replace convolutions of patches that do not overlap by matrix products with a row per patch.

Terms
-----
patch      The part of an operand that one position of the result reads. The kernel is as large as the stride, so each
           element belongs to one patch.
position   The place of a patch along each dimension of an image, or its number `t` among all of an entry of the batch.

A rule cannot compute some patches by a convolution: a patch is a block of an image, and not a range of one dimension.
As a product the rows of the result need a gather of their own patches, so no loop has a copy of the whole image. A
convolution makes one on the CPU, in the layout of its kernel.

Before:  y = convolution(x, w, bias)                        x [N, C, T, P, P], w [O, C, T, P, P]: y [N, O, 1, 1, 1]
After:   y = view(addmm(bias, view(x, [N, -1]), view(w, [O, -1]).t()), [N, O, 1, 1, 1])

Before:  y = view(convolution(x, w, bias), [B, O, n * m])   x [B, C, n * P, m * P], w [O, C, P, P]
After:   patches = view(x, [B, C, n, P, m, P])[:, :, t // m, :, t % m]         t = iota(n * m): [n * m, B, C, P, P]
         y = clone(permute(addmm(bias, patches of each entry, view(w, [O, -1]).t()), [0, 2, 1]))
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from mom_passes.graph.arguments import argument, argument_node, aten, axis, prims
from mom_passes.graph.edit import emit, emit_view, size_node
from mom_passes.graph.sizes import Size, all_same, is_one, product, same
from mom_passes.graph.strides import is_dense_in
from mom_passes.graph.values import value_of


def patch_products(gm: fx.GraphModule) -> list[fx.Node]:
    """Replace such convolutions in place. Return the new values."""
    convolutions = gm.graph.find_nodes(op="call_function", target=aten.convolution.default)
    replaced: list[fx.Node] = []
    for node in convolutions:
        if _has_one_position(node):
            replaced.append(_replace(node))
        elif _has_patches(node):
            replaced += _replace_flattened(node)
    if replaced:
        gm.graph.eliminate_dead_code()
        gm.recompile()
    return replaced


def _has_one_position(node: fx.Node) -> bool:
    """Return whether the kernel of a convolution is as large as its operand."""
    x, weight = (value_of(argument(node, name)) for name in ("input", "weight"))
    if not _is_plain(node):
        return False
    # One row is no token dimension: the convolution of a whole image with a kernel of its size.
    return all_same(x.shape[1:], weight.shape[1:]) and not is_one(x.shape[0])


def _has_patches(node: fx.Node) -> bool:
    """Return whether a convolution reads all of its operand in patches, and all readers number these."""
    x, weight, y = value_of(argument(node, "input")), value_of(argument(node, "weight")), value_of(node)
    kernel, positions = weight.shape[2:], y.shape[2:]
    if not _is_plain(node) or any(n != 1 for n in argument(node, "dilation")) or is_one(product(kernel)):
        return False
    if not all_same(kernel, argument(node, "stride")):
        return False
    if not all(same(product([n, size]), whole) for n, size, whole in zip(positions, kernel, x.shape[2:], strict=True)):
        return False
    return len(positions) > 1 and len(node.users) > 0 and all(_numbers_patches(user, y) for user in node.users)


def _numbers_patches(reader: fx.Node, y: torch.Tensor) -> bool:
    """Return whether a reader of a convolution is a view `[B, O, n * m]`, or an entry that is read as `[O, n * m]`."""
    batch, channels, *positions = y.shape
    flat = [batch, channels, product(positions)]
    if reader.target is aten.select.int and axis(argument(reader, "dim"), y.dim()) == 0:
        return all(_is_view(user, flat[1:]) for user in reader.users)
    return _is_view(reader, flat)


def _is_view(node: fx.Node, shape: Sequence[Size]) -> bool:
    return node.target is aten.view.default and all_same(value_of(node).shape, shape)


def _is_plain(node: fx.Node) -> bool:
    return not argument(node, "transposed") and argument(node, "groups") == 1 and not any(argument(node, "padding"))


def _replace(node: fx.Node) -> fx.Node:
    x = argument_node(node, "input")
    with node.graph.inserting_before(node):
        rows = emit_view(x, [value_of(x).shape[0], _width(node)], node)
        return _substitute(node, emit_view(_product(node, rows), value_of(node).shape, node))


def _replace_flattened(node: fx.Node) -> list[fx.Node]:
    graph, shape = node.graph, value_of(node).shape
    batch, channels, count = shape[0], shape[1], product(shape[2:])
    with graph.inserting_before(node):
        patches = _patches(node)
        patches = emit(graph, aten.permute.default, (patches, [1, 0, *range(2, value_of(patches).dim())]))
        rows = emit_view(patches, [product([batch, count]), _width(node)], node)
        made = emit_view(_product(node, rows), [batch, count, channels], node)
        new = emit(graph, aten.permute.default, (made, [0, 2, 1]))
        # Views of the result may rely on the layout of the convolution's: dense in this order, or with channels last.
        if is_dense_in(value_of(node), range(len(shape))):
            new = emit(graph, aten.clone.default, (new,), {"memory_format": torch.contiguous_format})
    replaced = []
    for user in list(node.users):
        if user.target is aten.select.int:
            with graph.inserting_before(user):
                entry = emit(graph, aten.select.int, (new, 0, argument(user, "index")))
            replaced += [_substitute(view, entry) for view in list(user.users)]
            graph.erase_node(user)
        else:
            replaced.append(_substitute(user, new))
    graph.erase_node(node)
    return replaced


def _patches(node: fx.Node) -> fx.Node:
    """Emit the patches `[n * m, B, C, P, P]` of the operand of a convolution."""
    graph, x = node.graph, argument_node(node, "input")
    (batch, channels), kernel = value_of(x).shape[:2], value_of(argument(node, "weight")).shape[2:]
    positions = value_of(node).shape[2:]
    blocks = [size for pair in zip(positions, kernel, strict=True) for size in pair]
    # A view in any layout: it only splits dimensions.
    parted = emit(graph, aten.view.default, (x, [size_node(graph, size, node) for size in (batch, channels, *blocks)]))
    device = value_of(x).device
    args = (size_node(graph, product(positions), node),)
    kwargs = {"start": 0, "step": 1, "dtype": torch.int64, "device": device, "requires_grad": False}
    number = emit(graph, prims.iota.default, args, kwargs)
    indices: list[fx.Node | None] = [None, None]
    for at in range(len(positions)):
        inner = size_node(graph, product(positions[at + 1 :]), node)
        place = emit(graph, aten.div.Tensor_mode, (number, inner), {"rounding_mode": "floor"})
        if at:
            place = emit(graph, aten.remainder.Scalar, (place, size_node(graph, positions[at], node)))
        indices += [place, None]
    return emit(graph, aten._unsafe_index.Tensor, (parted, indices))


def _width(node: fx.Node) -> Size:
    return product(value_of(argument(node, "weight")).shape[1:])


def _product(node: fx.Node, rows: fx.Node) -> fx.Node:
    """Emit the product of patches in rows with the kernels of a convolution, and its bias."""
    weight, bias = argument_node(node, "weight"), argument(node, "bias")
    kernels = emit_view(weight, [value_of(weight).shape[0], _width(node)], node)
    columns = emit(node.graph, aten.permute.default, (kernels, [1, 0]))
    if bias is None:
        return emit(node.graph, aten.mm.default, (rows, columns))
    return emit(node.graph, aten.addmm.default, (bias, rows, columns))


def _substitute(node: fx.Node, new: fx.Node) -> fx.Node:
    new.meta = {**node.meta, "val": new.meta["val"]}
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
    return new
