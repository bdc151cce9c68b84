"""A program as bytes says what it said, and what cannot be said is refused rather than half kept."""

from __future__ import annotations

import functools
import operator

import pytest
import sympy
import torch
from torch import fx

from mom_compile.lowering.pieces import Conditions, Piece
from mom_compile.lowering.storing import LARGEST_CONSTANT, NodeName, dumps, loads
from mom_compile.lowering.templates import SizeTemplate, SymbolFacts
from mom_compile.runtime.calls import Constant, OperatorCall
from mom_compile.torch_compat.compile_cache import NotStorable
from mom_compile.torch_compat.symbolic_sizes import SymbolicSizes
from mom_compile.torch_compat.tensors import FakeTensorMode
from mom_passes.graph.size_values import function_of
from mom_passes.graph.structure import lines_of

aten = torch.ops.aten

N = sympy.Symbol("n0", integer=True, nonnegative=True)


def graph() -> fx.Graph:
    """A piece's: with a size, an operator's overload, a custom operator, keyword arguments and a list of nodes."""
    made = fx.Graph()
    n, x = made.placeholder("n0"), made.placeholder("x")
    half = made.create_node("call_function", operator.floordiv, (n, 2), name="half_7")
    rows = made.call_function(aten.slice.Tensor, (x, 0, 0, half))
    joined = made.call_function(aten.cat.default, ([rows, rows], 0))
    cast = made.call_function(aten._to_copy.default, (joined,), {"dtype": torch.bfloat16})
    seen = made.call_function(torch.ops.mom.attention.default, (cast, cast, cast))
    seen.meta["eager_input_vals"] = ((), {})
    made.output((seen, None))
    return made


def test_a_graph_has_its_nodes_and_their_names_again():
    """Inductor's cache knows a piece by these."""
    before, after = graph(), loads(dumps(graph()))
    assert lines_of(after) == lines_of(before)
    assert [node.name for node in after.nodes] == [node.name for node in before.nodes]
    marked = [[node.name for node in g.nodes if "eager_input_vals" in node.meta] for g in (before, after)]
    assert marked[0] == marked[1] != []
    fx.GraphModule(torch.nn.Module(), after).graph.lint()


def test_a_piece_is_the_same_piece_again():
    def piece() -> Piece:
        gm = fx.GraphModule(torch.nn.Module(), graph())
        return Piece(gm, (SizeTemplate(N),), {N: SymbolFacts(12, 2)}, {"epilogue_fusion": False})

    read = loads(dumps(piece()))
    assert read.key() == piece().key() and not read.variants and not read.kept


def test_functions_of_sizes_compute_what_they_did():
    size = function_of(sympy.Max(0, 3 * N - 11), [N])
    holds = Conditions.of([sympy.Gt(N, 4), sympy.Ne(N, 9)], [N])
    size, holds = loads(dumps((size, holds)))
    assert [size([n]) for n in (1, 4, 10)] == [0, 1, 19]
    assert [holds((n,)) for n in (4, 5, 9, 10)] == [False, True, False, True]


def test_a_call_takes_its_arguments_wherever_they_stand():
    made = fx.Graph()
    x, y = made.placeholder("x"), made.placeholder("y")
    call = OperatorCall.of(made.call_function(aten.cat.default, ([y, x, y],), {"dim": 1}))
    a, b = torch.zeros(2, 1), torch.ones(2, 1)
    for step in (call, loads(dumps(call))):
        # Its distinct inputs, in the order in which they are read: y, x.
        assert torch.equal(step([b, a])[0], torch.tensor([[1.0, 0.0, 1.0]] * 2))


def test_numbers_that_are_sizes_are_told_as_expressions():
    sizes = SymbolicSizes()
    made = sizes.size("n0", 40, 2)
    assert loads(dumps([made + 1])) == [(made + 1).node.expr]


def test_a_node_that_is_not_stored_is_told_by_name():
    node = graph().find_nodes(op="call_function", target=aten.cat.default)[0]
    assert loads(dumps(node)) == NodeName("cat_default", "call_function", "aten.cat.default")


def test_a_small_constant_is_kept():
    assert torch.equal(loads(dumps(Constant(torch.arange(5))))([])[0], torch.arange(5))


def refused() -> dict[str, object]:
    with FakeTensorMode():
        fake = torch.empty(3)
    with_parts = fx.Graph()
    with_parts.get_attr("weight")
    return {
        "a function made within another": lambda: 1,
        "a fake tensor": fake,
        "a large constant": torch.empty(LARGEST_CONSTANT + 1, dtype=torch.uint8),
        "a whole module": fx.GraphModule(torch.nn.Module(), graph()),
        "a graph with parts of its own": with_parts,
        "a function of another's": functools.partial(lambda x: x, 1),
    }


@pytest.mark.parametrize("what", refused())
def test_what_another_process_could_not_use_is_refused(what):
    with pytest.raises(NotStorable):
        dumps(refused()[what])


@pytest.mark.parametrize("spoiled", [b"", b"\x80\x05nonsense", dumps([1, 2])[:-3]])
def test_what_cannot_be_read_is_refused(spoiled):
    with pytest.raises(NotStorable, match="cannot be read"):
        loads(spoiled)
