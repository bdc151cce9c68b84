"""Splitting rows, running a program, choosing a compiled variant."""

from __future__ import annotations

import gc
import weakref

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st

from mom_compile.lowering.pieces import Piece
from mom_compile.lowering.templates import SizeTemplate, SymbolFacts, TensorTemplate
from mom_compile.runtime.program import Program, Slot, Step
from mom_compile.torch_compat.inductor import codegen_settings
from mom_compile.torch_compat.symbolic_sizes import SymbolicSizes
from mom_passes.loops.loop import split_rows


@given(st.integers(1, 5000), st.integers(2, 600))
def test_rows_are_cut_at_multiples_and_none_stands_alone(length, mini):
    """Of lengths that differ, mini-sequences do not: whoever plans for shapes, cuDNN say, plans once. Only the last is
    shorter, or has two rows, of which one would stand alone (5 tokens by 2: 2 and 3)."""
    pieces = split_rows(length, mini)
    starts, counts = zip(*pieces, strict=True)
    assert sum(counts) == length
    assert list(starts) == [sum(counts[:i]) for i in range(len(counts))]
    assert set(counts[:-2]) <= {mini}
    assert min(counts) >= 2 or length == 1
    if length % mini != 1 or length == 1:
        assert list(starts) == list(range(0, length, mini))
    else:
        assert counts[-2:] == (mini - 1, 2) if mini > 2 else counts[-1] == 3
    assert len(pieces) == max(1, min(-(-length // mini), length // 2))


def test_a_value_dies_at_its_last_use():
    alive: dict[str, weakref.ref] = {}
    seen: list[list[str]] = []

    def step(name):
        def run(arguments):
            gc.collect()
            seen.append(sorted(n for n, ref in alive.items() if ref() is not None))
            arguments.clear()
            made = torch.empty(3)
            alive[name] = weakref.ref(made)
            return (made,)

        return run

    program = Program(
        steps=(
            Step("a", step("a"), (Slot(0),), (1,), (0,)),
            Step("b", step("b"), (Slot(1),), (2,), ()),
            Step("c", step("c"), (Slot(1), Slot(2)), (3,), (1, 2)),
            Step("d", step("d"), (Slot(3), 5), (4,), (3,)),
        ),
        slots=5,
        unread_inputs=(),
        outputs=(Slot(4),),
    )
    given_input = torch.empty(2)
    alive["x"] = weakref.ref(given_input)
    inputs = [given_input]
    del given_input
    (out,) = program(inputs)
    assert inputs == []
    assert out.shape == (3,)
    # Each step sees what the steps before it left: `x` is an argument of the first alone, `a` of two.
    assert seen == [["x"], ["a"], ["a", "b"], ["c"]]


@pytest.mark.parametrize("fails", [False, True])
def test_a_program_is_finished_in_any_case_and_an_exception_holds_no_value(fails):
    alive: list[weakref.ref] = []
    finished: list[bool] = []

    def make(arguments):
        made = torch.empty(3)
        alive.append(weakref.ref(made))
        return (made,)

    def use(arguments):
        if fails:
            raise ValueError("stop")
        return (arguments[0] + 1,)

    program = Program(
        steps=(
            Step("a", make, (), (0,), ()),
            Step("b", make, (), (1,), ()),
            Step("c", use, (Slot(1),), (2,), (1,)),
        ),
        slots=3,
        unread_inputs=(),
        outputs=(Slot(0), Slot(2)),
        finish=lambda: finished.append(alive[1]() is None),
    )
    if not fails:
        assert len(program([])) == 2
        assert finished == [True]
        return
    with pytest.raises(ValueError, match="stop") as caught:
        program([])
    assert caught.tb is not None
    assert [value() for value in alive] == [None, None]
    assert finished == [True]


@pytest.fixture
def doubling() -> Piece:
    """`(n, x[n, 4]) -> 2 * x`."""
    graph = torch.fx.Graph()
    graph.placeholder("n")
    x = graph.placeholder("x")
    graph.output((graph.call_function(torch.ops.aten.mul.Tensor, (x, 2)),))
    n = sympy.Symbol("n0", integer=True, nonnegative=True)
    templates = (
        SizeTemplate(n),
        TensorTemplate((n, sympy.Integer(4)), (sympy.Integer(4), sympy.Integer(1)), torch.float32, torch.device("cpu")),
    )
    gm = torch.fx.GraphModule(torch.nn.Module(), graph)
    return Piece(gm, templates, {n: SymbolFacts(8, 2)}, {}, codegen_settings())


def test_one_compilation_serves_every_size(doubling):
    doubling.compile()
    for rows in (8, 3, 100):
        x = torch.randn(rows, 4)
        assert torch.equal(doubling([rows, x])[0], 2 * x)
    assert len(doubling.variants) == 1
    assert doubling.eager_reason is None


def test_a_size_below_what_compiled_code_assumes_runs_eagerly(doubling):
    doubling.compile()
    x = torch.randn(1, 4)
    assert torch.equal(doubling([1, x])[0], 2 * x)
    assert doubling.chosen[(1,)] == doubling.run_eagerly


def test_a_broken_assumption_compiles_another_variant(doubling, monkeypatch):
    def at_most_ten(self):
        (symbol,) = self.symbols.values()
        hint = int(self.env.backed_var_to_val[symbol])
        return [symbol <= 10] if hint <= 10 else [symbol > 10]

    monkeypatch.setattr(SymbolicSizes, "assumptions", at_most_ten)
    doubling.compile()
    for rows, variants in ((5, 1), (10, 1), (11, 2), (300, 2), (7, 2)):
        x = torch.randn(rows, 4)
        assert torch.equal(doubling([rows, x])[0], 2 * x)
        assert len(doubling.variants) == variants
