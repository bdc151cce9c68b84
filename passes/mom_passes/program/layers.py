"""Cut a graph without loops at its attentions, so that the code shared by layers is compiled once.

    layer 0 .. attention | layer 0's rest, layer 1 .. attention | ... | the last layer's rest, head
                           one piece, called once per layer

No kernel is fused across an attention, so a cut there costs only the call of a piece. A graph that writes to its inputs
stays whole: Inductor writes in place where the value is computed, pieces could write only at the end.
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
    """The program of a graph cut after its attentions, or None if it has none or writes to inputs.

    An attention whose keys arrive by a step of their own has a cut before it already.
    """
    found = {node for node in gm.graph.nodes if node.target is MOM_ATTENTION or isinstance(node.target, FlexAttention)}
    if not found or any(is_mutation(node) for node in gm.graph.nodes):
        return None
    return schedule(gm, {node for node in found if not any(n.target in COPIES for n in map(base_of, operands(node)))})
