"""What must hold after every pass. A violation is a bug of ours; the caller falls back."""

from __future__ import annotations

import torch
from torch import fx

from passes.errors import PassError
from passes.mini_sequence import MiniSequence, loops


def verify(gm: fx.GraphModule) -> None:
    """Raises `PassError` where the graph is not well formed.

    - every node is defined before it is used, every target exists
    - every tensor operation knows its value's shape
    - a loop's body takes `(start, count)` and what its spec says, and returns what the spec stores
    """
    try:
        gm.graph.lint()
    except RuntimeError as error:
        raise PassError(f"malformed graph: {error}") from error
    for node in gm.graph.nodes:
        if node.op == "call_function" and "val" not in node.meta and _returns_tensor(node):
            raise PassError(f"{node.name} ({node.target}) has lost its value")
    for name, loop in loops(gm):
        _verify_loop(name, loop)


def _verify_loop(name: str, loop: MiniSequence) -> None:
    loop.body.graph.lint()
    placeholders = [n for n in loop.body.graph.nodes if n.op == "placeholder"]
    spec = loop.spec
    expected = 2 + len(spec.sizes) + len(spec.sliced) + spec.whole
    if len(placeholders) != expected:
        raise PassError(f"{name}: the body takes {len(placeholders)} values, the loop passes {expected}")
    returned = next(n for n in loop.body.graph.nodes if n.op == "output").args[0]
    if len(returned) != len(spec.outputs):
        raise PassError(f"{name}: the body returns {len(returned)} values, the loop stores {len(spec.outputs)}")


def _returns_tensor(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(isinstance(r.type, torch.TensorType) for r in schema.returns)
