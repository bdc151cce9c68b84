"""Which packed sequences the loops of a graph hold (see `mom_passes.tokens.packed_keys`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from mom_passes.tokens.dims import TokenDims
from mom_passes.tokens.packed_keys import PackedRanges, keep_in_loops, packed_attentions, ranges_of


@dataclass(frozen=True, eq=False)
class Packing:
    """Packed sequences of a graph whose attentions may be inside loops.

    ranges    how the ranges of each packing follow from the inputs of the graph
    held      for each, whether its attentions are inside loops
    unbroken  tokens of the longest sequence that a loop must not cut
    rows      rows of the shortest mini-sequences
    """

    ranges: tuple[PackedRanges, ...] = ()
    held: tuple[bool, ...] = ()
    unbroken: int = 0
    rows: int = 0

    def fit(self, inputs: Sequence[Any]) -> tuple[bool, ...]:
        """Return `held` of a program for a call with these inputs."""
        return tuple(one.fit(inputs, self.rows) for one in self.ranges)


NO_PACKING = Packing()


def keep_packed(
    gm: fx.GraphModule, dims: TokenDims, rows: int, inputs: Sequence[Any] | None
) -> tuple[Packing, str]:
    """Mark in place the attentions to packed sequences that loops hold. `rows` are those of the shortest
    mini-sequences, `inputs` those of a call; without them no loop holds any."""
    candidates = packed_attentions(gm, dims)
    found = {spans: ranges for spans in candidates if (ranges := ranges_of(spans)) is not None}
    packing = Packing(tuple(found.values()), (False,) * len(found), rows=rows)
    if inputs is not None:
        packing = replace(packing, held=packing.fit(inputs))
    held = [spans for spans, fits in zip(found, packing.held, strict=True) if fits]
    for spans in held:
        keep_in_loops(candidates[spans])
    if inputs is not None and held:
        packing = replace(packing, unbroken=max(found[spans].longest(inputs)[0] for spans in held))
    return packing, f"{len(held)} of {len(candidates)} packings of sequences inside loops"
