"""Which keys and values a cache keeps in another form, as integers with a scale, say. An analysis: it explains.

    for each value that an attention reads whole and that does not leave the graph itself:
        whatever of the graph's outputs is made of it, by anything but an attention or a product, is its other form

Such a form is the cache's own business: it stays where the cache put it.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator

from torch import fx

from passes.kv_values import read_whole, source_of
from passes.mini_sequence import MiniSequence
from passes.token_dims import matmul_work

REASON = "the cache keeps keys or values in a form of its own (quantised, say), which is left where it is"


def kept_in_another_form(gm: fx.GraphModule, found: Collection[fx.Node]) -> dict[str, str]:
    """Names of outputs that are made of keys or values, with the reason why they stay. `found` leave as they are."""
    output = next(iter(reversed(gm.graph.nodes)))
    itself = {source_of(node) for node in found}
    roots = {source_of(value) for node in gm.graph.nodes for value in read_whole(gm, node)}
    made = {result for root in roots - itself if root.op == "call_function" for result in _made_of(gm, root)}
    return {node.name: REASON for node in output.all_input_nodes if node in made}


def _made_of(gm: fx.GraphModule, root: fx.Node) -> set[fx.Node]:
    made = set(_made_in_its_loop(gm, root))
    pending = [root, *made]
    while pending:
        node = pending.pop()
        for user in node.users:
            if user not in made and _passes_on(user):
                made.add(user)
                pending.append(user)
    return made


def _passes_on(user: fx.Node) -> bool:
    return user.op == "call_function" and not matmul_work(user)


def _made_in_its_loop(gm: fx.GraphModule, root: fx.Node) -> Iterator[fx.Node]:
    """Other results of the loop that makes a value, if they are made of its rows."""
    source = root.args[0] if root.target is operator.getitem else None
    if not isinstance(source, fx.Node) or source.op != "call_module":
        return
    loop = gm.get_submodule(str(source.target))
    assert isinstance(loop, MiniSequence)
    rows = next(iter(reversed(loop.body.graph.nodes))).args[0]
    assert isinstance(rows, (tuple, list))
    made = _made_of(loop.body, source_of(rows[root.args[1]]))  # type: ignore[index, arg-type]
    for result in source.users:
        if result is not root and rows[result.args[1]] in made:  # type: ignore[index]
            yield result
