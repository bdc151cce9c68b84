"""Where a graph without loops is cut, so that what its layers have in common is compiled once.

    layer 0 .. attention | layer 0's rest, layer 1 .. attention | ... | the last layer's rest, head
                           one piece, as often as there are layers

An attention is a kernel of its own: nothing is fused across it, so a cut there costs the call of a piece and no more.
A graph that writes to its inputs stays whole: Inductor writes where it computes, pieces would only at the end.
"""

from __future__ import annotations

from torch import fx

from mom_passes.attention.flex import FlexAttention
from mom_passes.graph.aliasing import base_of, is_mutation
from mom_passes.graph.values import operands
from mom_passes.ops.attention import MOM_ATTENTION
from mom_passes.ops.transfers import COPIES
from mom_passes.program.program import Program
from mom_passes.program.schedule import schedule


def by_layers(gm: fx.GraphModule) -> Program | None:
    """The program of a graph cut behind its attentions; None for a graph without any, or one that writes to inputs.

    An attention whose keys are a step of their own has a cut before it already.
    """
    found = {node for node in gm.graph.nodes if node.target is MOM_ATTENTION or isinstance(node.target, FlexAttention)}
    if not found or any(is_mutation(node) for node in gm.graph.nodes):
        return None
    return schedule(gm, {node for node in found if not any(n.target in COPIES for n in map(base_of, operands(node)))})
