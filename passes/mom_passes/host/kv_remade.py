"""Keys and values that a cache keeps in another form, such as integers with a scale. An analysis for reports.

    for each value that an attention reads directly and that is not itself an output:
        every output computed from it without an attention or a product is its other form

Such outputs stay where the cache put them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import fx

from mom_passes.attention.reads import Read, source_of
from mom_passes.graph.values import derived_from
from mom_passes.rules.work import matmul_work

REASON = "the cache keeps keys or values in a form of its own (quantised, say), which is left where it is"


def kept_in_another_form(
    outputs: Collection[fx.Node], reads: Mapping[fx.Node, Read], found: Collection[fx.Node]
) -> dict[fx.Node, str]:
    """Outputs computed from keys or values, with the reason why they stay. `found` leave the graph unchanged."""
    itself = {source_of(node) for node in found}
    roots = {source_of(value) for value, read in reads.items() if read.itself}
    made = {result for root in roots - itself if root.op == "call_function" for result in _computed_from(root)}
    return {node: REASON for node in outputs if node in made}


def _computed_from(root: fx.Node) -> set[fx.Node]:
    return derived_from(root, lambda user: user.op == "call_function" and not matmul_work(user))
