"""What several passes do to graphs: copy one, look an attribute up."""

from __future__ import annotations

from typing import Any

from torch import fx


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy whose nodes keep their metadata; parameters and fake values are shared."""
    graph = fx.Graph()
    output = graph.graph_copy(gm.graph, {})
    new_output = graph.output(output)
    new_output.meta = dict(next(iter(reversed(gm.graph.nodes))).meta)
    copied = fx.GraphModule(gm, graph)
    copied.meta = dict(gm.meta)
    return copied


def attribute(gm: fx.GraphModule, name: str) -> Any:
    """The value of a `get_attr` target such as `"layers.0.table"`."""
    owner: Any = gm
    for part in name.split("."):
        owner = getattr(owner, part)
    return owner
