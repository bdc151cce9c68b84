"""Writes to the inputs of a graph, and reads that follow them. An analysis.

Terms
-----
write     An operator that changes an operand: `copy_(state, new)`, by which a graph updates a caller's buffer.
          Functionalisation places writes at the end, after all reads of the old contents.
read      An operator that accesses the bytes of a value. A view of an input does not; an operator on the view does.

The law: no operator after a write reads the written input or a view of it. A captured graph with such a read is left as
it is (`read_after_write`); a rewritten graph must not have gained any (`mom_passes.verify`).
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from mom_passes.graph.aliasing import MAY_COPY, base_of, is_mutation, may_be_a_view
from mom_passes.source_lines import with_source_line
from mom_passes.torch_compat import schema_of


def read_after_write(gm: fx.GraphModule) -> str | None:
    """The first read of an input after a write to it, or write to a value that is no input, as a message; else None."""
    bases: dict[fx.Node, fx.Node] = {}
    written: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            bases[node] = node
        if node.op not in ("call_function", "call_module"):
            continue
        if is_mutation(node):
            for target in written_by(node):
                if target not in bases:
                    text = f"{node.name} ({node.target}) writes to {target.name}, which is not an input"
                    return with_source_line(text, node)
                written[bases[target]] = node
                bases[node] = bases[target]
            continue
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if source in bases and (node.target is operator.getitem or may_be_a_view(node)):
            bases[node] = bases[source]
            if node.target not in MAY_COPY:
                continue
        for operand in node.all_input_nodes:
            write = written.get(bases.get(operand, operand))
            if write is not None:
                text = f"{node.name} ({node.target}) reads {operand.name} after {write.name} has written to it"
                return with_source_line(text, node)
    return None


def written_inputs(gm: fx.GraphModule) -> tuple[str, ...]:
    """Names of the inputs that are written to, sorted, one entry for each write."""
    writes = (target for node in gm.graph.nodes if node.op == "call_function" and is_mutation(node)
              for target in written_by(node))  # fmt: skip
    return tuple(sorted(base_of(target).name for target in writes))


def written_by(node: fx.Node) -> list[fx.Node]:
    """The operands that an operator writes to."""
    return written_by_schema(node, schema_of(node.target))


def written_by_schema(node: fx.Node, schema: Any) -> list[fx.Node]:
    """The operands that a call writes to under this schema."""
    written = []
    for place, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            positional = not argument.kwarg_only and place < len(node.args)
            written.append(node.args[place] if positional else node.kwargs.get(argument.name))
    found: list[fx.Node] = []
    fx.map_arg(written, found.append)
    return found
