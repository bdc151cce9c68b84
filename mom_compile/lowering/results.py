"""A piece returns each result in the layout that its readers are compiled for.

The graph around a piece states the strides of each result, and the readers of a result are compiled for them. Operators
in the piece may give the result other strides, because the inputs of the piece have other strides. Inductor returns the
strides that a fake kernel claims. If readers expect different strides, the piece ends with a copy.

Before:  y = op(x);                             return y            y: strides (1, 50), expected: (32, 1)
After:   y = op(x); own = copy_rows(y, [0, 1]); return own
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from mom_passes.graph.edit import emit
from mom_passes.graph.meta import meta_value
from mom_passes.graph.strides import is_dense_in
from mom_passes.ops.rows import COPY_ROWS


def lay_out_results(gm: fx.GraphModule, orders: Sequence[Sequence[int] | None]) -> None:
    """Append the copies, in place. `orders` has an order of dimensions for each result; None accepts any strides.

    The fake values in the graph are those that its operators return. A graph whose results have the expected strides
    is not changed.
    """
    graph = gm.graph
    output = next(iter(reversed(graph.nodes)))
    returned = list(output.args[0])  # type: ignore[arg-type]
    for number, order in enumerate(orders):
        result = returned[number]
        if order is not None and not is_dense_in(meta_value(result), order):
            with graph.inserting_before(output):
                returned[number] = emit(graph, COPY_ROWS, (result, list(order)))
    if returned != list(output.args[0]):  # type: ignore[arg-type]
        output.args = (tuple(returned),)
        gm.recompile()
