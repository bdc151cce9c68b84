"""What must hold after every pass. A violation is a bug of ours; the caller falls back."""

from __future__ import annotations

import torch
from torch import fx

from mom_passes.errors import PassError
from mom_passes.graph.writes import read_behind_a_write
from mom_passes.loops.loop import MiniSequence, loop_nodes
from mom_passes.ops.transfers import APPEND, COPIES, FETCH_START, FETCH_WAIT, OFFLOAD
from mom_passes.torch_compat import schema_of


def verify(gm: fx.GraphModule) -> None:
    """Raises `PassError` where the graph is not well formed.

    - every node is defined before it is used, every target exists
    - every tensor operation knows its value's shape
    - nothing reads a value after a loop has written over it, and no input is written over
    - nothing reads an input behind a write to it
    - a buffer that a past arrives in is read by what waits for it alone, and what is on the host by nothing
    - a loop's body takes `(start, count)` and what its spec says, and returns what the spec stores
    """
    try:
        gm.graph.lint()
    except RuntimeError as error:
        raise PassError(f"malformed graph: {error}") from error
    for node in gm.graph.nodes:
        if node.op == "call_function" and "val" not in node.meta and _returns_tensor(node):
            raise PassError(f"{node.name} ({node.target}) has lost its value")
        if node.target in COPIES:
            _verify_copy(node)
    wrong = read_behind_a_write(gm)
    if wrong is not None:
        raise PassError(wrong)
    for node, loop in loop_nodes(gm):
        _verify_loop(str(node.target), loop)
        _verify_takeovers(node, loop)


def _verify_copy(node: fx.Node) -> None:
    if node.target is FETCH_START and any(user.target is not FETCH_WAIT for user in node.users):
        raise PassError(f"{node.name} is read before it is filled")
    if node.target in (APPEND, OFFLOAD) and any(user.op != "output" for user in node.users):
        raise PassError(f"{node.name} is on the host and is read on the device")


def _verify_loop(name: str, loop: MiniSequence) -> None:
    loop.body.graph.lint()
    placeholders = [n for n in loop.body.graph.nodes if n.op == "placeholder"]
    spec = loop.spec
    expected = 2 + len(spec.sizes) + len(spec.sliced) + spec.whole
    if len(placeholders) != expected:
        raise PassError(f"{name}: the body takes {len(placeholders)} values, the loop passes {expected}")
    returned = next(n for n in loop.body.graph.nodes if n.op == "output").args[0]
    if len(returned) != len(spec.outputs) + len(spec.folds):
        stores = f"{len(spec.outputs)} and folds {len(spec.folds)}"
        raise PassError(f"{name}: the body returns {len(returned)} values, the loop stores {stores}")


def _verify_takeovers(node: fx.Node, loop: MiniSequence) -> None:
    operands = loop.spec.sliced_of(node)
    for output in loop.spec.outputs:
        if output.takes_over is None:
            continue
        operand = operands[output.takes_over]
        value = operand.meta["val"]
        if operand.op != "call_function" or list(node.args).count(operand) != 1:
            raise PassError(f"{node.target} would write over {operand.name}, which is not its own")
        if any(user is not node and not user < node for user in operand.users):
            raise PassError(f"{node.target} would write over {operand.name}, which is read later")
        if value.dtype != output.dtype or loop.spec.sliced[output.takes_over] != output.dim:
            raise PassError(f"{node.target}: {output.name} does not fit where {operand.name} was")


def _returns_tensor(node: fx.Node) -> bool:
    schema = schema_of(node.target)
    return schema is not None and any(isinstance(r.type, torch.TensorType) for r in schema.returns)
