"""A piece returns each result in the layout that its readers are compiled for.

The graph around a piece says how a result lies in memory, and what reads it is compiled for that. Inside the piece the
operators may give it other strides, because its inputs have others. Inductor returns the strides that a fake kernel
claims. Where these are not the ones that readers expect, the piece ends with a copy that has them.

Before:  y = op(x);                             return y            y: strides (1, 50), expected: (32, 1)
After:   y = op(x); own = copy_rows(y, [0, 1]); return own
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from mom_passes.graph.edit import emit
from mom_passes.graph.strides import is_dense_in
from mom_passes.ops.rows import COPY_ROWS


def lay_out_results(gm: fx.GraphModule, orders: Sequence[Sequence[int] | None]) -> None:
    """Append the copies, in place. `orders` are those of the results, None where any strides will do.

    The graph's fake values are those of its operators. A graph whose results lie as expected stays as it is.
    """
    graph = gm.graph
    output = next(iter(reversed(graph.nodes)))
    returned = list(output.args[0])  # type: ignore[arg-type]
    for number, order in enumerate(orders):
        result = returned[number]
        if order is not None and not is_dense_in(result.meta["val"], order):
            with graph.inserting_before(output):
                returned[number] = emit(graph, COPY_ROWS, (result, list(order)))
    if returned != list(output.args[0]):  # type: ignore[arg-type]
        output.args = (tuple(returned),)
        gm.recompile()
