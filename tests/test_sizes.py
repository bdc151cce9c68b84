"""Sizes that are computed: one reading of them, and programs in which they change from one call to the next."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
import torch.utils._sympy.functions as torch_functions
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from benchmarks.models import keeping
from mom_compile import MomWarning, reports
from mom_passes.errors import PassError
from mom_passes.graph.edit import size_node
from mom_passes.graph.size_values import CALLS, evaluate, function_of
from mom_passes.graph.sizes import fixed_sizes, same
from tests.models import ids, sweep, tiny
from tests.programs import ATTENTION, HIDDEN, ROWWISE, weights_of
from tests.test_properties import RANDOM_PROGRAMS
from tests.tracing import trace

S, T = (sympy.Symbol(name, integer=True, positive=True) for name in "st")
MINI = {"mini_seq_len": 8, "strict": True}

# --- one reading ---


def _of(name: str) -> Callable[..., Any]:
    return getattr(torch_functions, name)


def _floats(of_ints: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        of_ints.map(_of("ToFloat")),
        st.builds(_of("IntTrueDiv"), of_ints, st.integers(1, 9)),
        of_ints.map(lambda e: _of("OpaqueUnaryFn_sqrt")(_of("ToFloat")(_of("Max")(e, 0)))),
        of_ints.map(lambda e: _of("OpaqueUnaryFn_log2")(_of("ToFloat")(_of("Max")(e, 1)))),
        of_ints.map(lambda e: _of("FloatTrueDiv")(_of("ToFloat")(e), sympy.Float(1.5))),
        of_ints.map(lambda e: _of("TruncToFloat")(_of("IntTrueDiv")(e, 7))),
    )


def _bigger(sizes: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    few = st.integers(1, 9).map(sympy.Integer)
    floats = _floats(sizes)
    return st.one_of(
        st.builds(lambda a, b: a + b, sizes, sizes),
        st.builds(lambda a, b: a - b, sizes, sizes),
        st.builds(lambda a, b: a * b, sizes, sizes),
        st.builds(_of("FloorDiv"), sizes, few),
        st.builds(_of("CleanDiv"), sizes, few),
        st.builds(_of("PythonMod"), sizes, few),
        st.builds(lambda a, b: _of("Mod")(_of("Max")(a, 0), b), sizes, few),
        st.builds(lambda a, b, c: _of("ModularIndexing")(_of("Max")(a, 0), b, c), sizes, few, few),
        st.builds(_of("Max"), sizes, sizes),
        st.builds(_of("Min"), sizes, sizes),
        st.builds(lambda a, b, c: _of("Where")(sympy.Gt(a, b), b, c), sizes, sizes, sizes),
        st.builds(lambda a, b: _of("BitwiseFn_bitwise_and")(_of("Max")(a, 0), b), sizes, few),
        st.builds(_of("PowByNatural"), few, few),
        sizes.map(lambda e: e * (e + 1) / 2),
        st.builds(lambda a, b: sympy.ceiling(a / b), sizes, few),
        st.builds(lambda a, b: sympy.floor(a / b), sizes, few),
        floats.map(_of("CeilToInt")),
        floats.map(_of("FloorToInt")),
        floats.map(_of("TruncToInt")),
        floats.map(_of("RoundToInt")),
    )


SIZES = st.recursive(st.sampled_from([S, T, *map(sympy.Integer, range(-3, 12))]), _bigger, max_leaves=6)


@settings(RANDOM_PROGRAMS, max_examples=200)
@given(size=SIZES, s=st.integers(1, 70), t=st.integers(1, 70))
def test_a_size_is_what_sympy_says_it_is(size: Any, s: int, t: int) -> None:
    substituted = size.xreplace({S: sympy.Integer(s), T: sympy.Integer(t)})
    expected = int(substituted)
    assert evaluate(size, {S: s, T: t}) == expected
    assert function_of(size, [T, S])([t, s]) == expected


@settings(RANDOM_PROGRAMS, max_examples=25)
@given(size=SIZES, s=st.integers(2, 70), t=st.integers(2, 70))
def test_a_graph_computes_any_size_from_those_it_has(size: Any, s: int, t: int) -> None:
    gm = trace(lambda x: x + 1, torch.zeros(s, t), dynamic=True)
    own = dict(zip((S, T), (n.node.expr for n in next(iter(gm.graph.nodes)).meta["val"].shape), strict=True))
    if own[S] == own[T]:
        own[T] = own[S]  # equal sizes share a symbol
        t = s
    output = gm.graph.output_node()
    with gm.graph.inserting_before(output):
        found = size_node(gm.graph, size.xreplace(own))
    output.args = (found,)
    gm.recompile()
    expected = evaluate(size, {S: s, T: t})
    assert gm(torch.zeros(s, t)) == expected
    if isinstance(found, fx.Node):
        assert same(found.meta["val"], size.xreplace(own))
        assert found.meta["val"].node.hint == expected


def test_every_function_of_pytorch_has_a_reading() -> None:
    """Those the table does not name are sympy's to compute: this draws attention to new ones, by name."""
    made = {
        "CeilDiv", "LShift", "RShift", "Identity",  # never seen as such, or only around another
        "IsNonOverlappingAndDenseIndicator", "RoundDecimal", "TruncToFloat", "MinMaxBase",
    }  # fmt: skip
    for name, function in inspect.getmembers(torch_functions, inspect.isclass):
        if issubclass(function, sympy.Basic) and function.__module__ == torch_functions.__name__:
            known = name in CALLS or name in made or name.startswith(("OpaqueUnaryFn_", "BitwiseFn_"))
            assert known, f"PyTorch's {name}"


def test_a_function_that_only_sympy_knows_is_computed_by_sympy() -> None:
    class Doubled(sympy.Function):
        @classmethod
        def eval(cls, value: Any) -> Any:
            return 2 * value if value.is_Integer else None

    assert evaluate(Doubled(S) + 1, {S: 5}) == 11
    assert evaluate(_of("Identity")(S + 1) * 2, {S: 5}) == 12
    piecewise = sympy.Piecewise((S, S > 7), (S + 1, S > 3), (0, True))
    assert [evaluate(piecewise, {S: value}) for value in (9, 5, 2)] == [9, 6, 0]


def test_a_size_in_unknown_symbols_is_refused_by_name() -> None:
    with pytest.raises(PassError, match=r"size t"):
        evaluate(S + T, {S: 1})


# --- programs ---

W = weights_of(torch.float64)


def block(x: torch.Tensor) -> torch.Tensor:
    return ROWWISE["mlp"](ATTENTION["causal"](x, W), W)


def padded(x: torch.Tensor) -> torch.Tensor:
    return F.pad(x, (0, 0, 0, -x.shape[1] % 8))


PROGRAMS: dict[str, Callable[[torch.Tensor], Any]] = {
    "second half": lambda x: block(block(x)[:, x.shape[1] // 2 :]),
    "every other": lambda x: block(block(x)[:, ::2]),
    "every third": lambda x: block(block(x)[:, 1::3]),
    "last eleven": lambda x: block(block(x)[:, max(0, x.shape[1] - 11) :]),
    "first twenty": lambda x: block(block(x)[:, : min(x.shape[1], 20)]),
    "without a rest": lambda x: block(block(x)[:, x.shape[1] % 8 :]),
    "last third": lambda x: block(block(x))[:, -(x.shape[1] // 3) :],
    "window of the last layer": lambda x: block(block(x))[:, max(0, x.shape[1] - 11) :],
    "a few beside all": lambda x: (block(block(x)), block(x)[:, max(0, x.shape[1] - 3) :]),
    "padded to eights": lambda x: block(padded(block(x)))[:, : x.shape[1]],
    "scale": lambda x: block(block(x) * x.shape[1] ** 0.5),
    "mean": lambda x: block(block(x) / x.shape[1]),
    "log scale": lambda x: block(block(x) * math.log(x.shape[1])),
    "root": lambda x: block(block(x)[:, int(x.shape[1] ** 0.5) :]),
    "numbers returned": lambda x: (block(block(x)), x.shape[1] ** 0.5, x.shape[1] // 2, x.shape[1] % 2 == 0),
}


def inputs(tokens: int) -> torch.Tensor:
    return torch.randn(2, tokens, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(tokens))


#: Much like others of them.
ALIKE = {"every third", "first twenty", "last eleven", "last third", "mean", "scale", "log scale"}


@pytest.mark.usefixtures("eager_pieces")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in ALIKE else []) for name in PROGRAMS]
)
def test_sizes_computed_from_the_length_follow_it(name: str) -> None:
    program = PROGRAMS[name]
    with torch.no_grad():
        fast = torch.compile(program, backend="mom", dynamic=True, options=MINI)
        for tokens in (40, 61, 12):
            torch.testing.assert_close(fast(inputs(tokens)), program(inputs(tokens)), rtol=1e-9, atol=1e-9)
    assert all(report.stages for report in reports())


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_compiled_code_takes_sizes_computed_from_the_length(name: str) -> None:
    program = PROGRAMS[name]
    with torch.no_grad():
        fast = torch.compile(program, backend="mom", options=MINI)
        for tokens in (40, 61, 38):
            torch.testing.assert_close(fast(inputs(tokens)), program(inputs(tokens)), rtol=1e-9, atol=1e-9)
    assert not any(report.eager_pieces for report in reports())


@pytest.mark.usefixtures("stock_is_eager", "eager_pieces")
def test_a_size_that_cannot_be_computed_falls_back_while_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(*_: Any) -> Any:
        raise PassError("no value of the graph has the size x")

    monkeypatch.setattr("mom_compile.lowering.build.function_of", cannot)
    program = PROGRAMS["every other"]
    fast = torch.compile(program, backend="mom", dynamic=True, options={"mini_seq_len": 8})
    with torch.no_grad(), pytest.warns(MomWarning, match="no value of the graph has the size x"):
        found = fast(inputs(40))
    torch.testing.assert_close(found, program(inputs(40)), rtol=1e-9, atol=1e-9)


class Holder(torch.nn.Module):
    """A module with a tensor that is neither parameter nor buffer: Dynamo makes symbols of its sizes."""

    def __init__(self, where: str) -> None:
        super().__init__()
        table = torch.linspace(-1, 1, 128 * HIDDEN, dtype=torch.float64).view(128, HIDDEN)
        self.where = where
        self.plain = table.clone()
        self.listed = [table.clone()]
        self.named = {"table": table.clone()}
        self.of_object = SimpleNamespace(table=table.clone())

    def table(self) -> torch.Tensor:
        held = {"plain": self.plain, "list": self.listed[0], "dict": self.named["table"]}
        return held.get(self.where, self.of_object.table)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.where == "replaced":
            self.plain = self.plain + 1
            return block(block(x + self.plain[: x.shape[1]]))
        if self.where == "written":
            self.plain[: x.shape[1]] += 1
        return block(block(x + self.table()[: x.shape[1]]))


#: Dynamo names the other places otherwise; a graph has the same inputs.
PLACES = {"plain", "replaced", "written"}


@pytest.mark.usefixtures("eager_pieces")
@pytest.mark.parametrize("where", sweep(["plain", "list", "dict", "object", "replaced", "written"], PLACES))
def test_a_tensor_that_is_an_attribute_may_have_symbols_for_sizes(where: str) -> None:
    program, compiled = Holder(where), Holder(where)
    fast = torch.compile(compiled, backend="mom", dynamic=True, options=MINI)
    with torch.no_grad():
        for tokens in (40, 61):
            torch.testing.assert_close(fast(inputs(tokens)), program(inputs(tokens)), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(compiled.plain, program.plain, rtol=0, atol=0)
    assert all(report.stages for report in reports())


def test_symbols_are_no_fixed_sizes() -> None:
    gm = trace(lambda x: x + 1, torch.zeros(128, 6), dynamic=True)
    sizes = fixed_sizes([next(iter(gm.graph.nodes)).meta["val"], torch.zeros(3, 4), 5, None])
    assert sizes == {3, 4}


def chosen(x: torch.Tensor) -> Any:
    y = block(x)
    return block(y[:, (x[0, :, 0] > 0).nonzero()[:, 0]])


def item(x: torch.Tensor) -> Any:
    return block(block(x) * x[0, 0].argmax().item())


@pytest.mark.usefixtures("stock_is_eager", "eager_pieces")
@pytest.mark.parametrize("program", [chosen, item])
def test_sizes_that_depend_on_data_are_left_to_inductor_by_name(program: Callable[..., Any]) -> None:
    kept = torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True)
    with torch.no_grad(), kept:
        fast = torch.compile(program, backend="mom", options=MINI)
        torch.testing.assert_close(fast(inputs(40)), program(inputs(40)), rtol=1e-9, atol=1e-9)
    assert "matrix products depend on" in str(reports()[-1].fallback)


# --- models ---


#: Family -> changed settings.
WINDOWED: dict[str, dict[str, Any]] = {
    "Mistral": {"sliding_window": 12},
    "Gemma3Text": {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]},
    "Mpt": {},
}


@pytest.mark.usefixtures("eager_pieces")
@pytest.mark.parametrize(
    ("family", "static"),
    [
        ("Gemma3Text", True),
        pytest.param("Mistral", False, marks=pytest.mark.slow),
        pytest.param("Mpt", False, marks=pytest.mark.slow),
        pytest.param("Mistral", True, marks=pytest.mark.slow),
        pytest.param("Gemma3Text", False, marks=pytest.mark.slow),
    ],
)
def test_a_second_turn_behind_a_window_equals_eager(family: str, static: bool) -> None:
    model = tiny(family, **WINDOWED[family])

    def turns(forward: Callable[..., Any]) -> list[torch.Tensor]:
        found = []
        for lengths in ((40, 33), (30, 41)):
            cache = (
                transformers.StaticCache(config=model.config, max_cache_len=96)
                if static
                else transformers.DynamicCache(config=model.config)
            )
            found += [forward(input_ids=ids(1, n), **keeping(cache, model), use_cache=True).logits for n in lengths]
        return found

    with torch.no_grad():
        expected = turns(model.forward)
        actual = turns(torch.compile(model.forward, backend="mom", dynamic=True, options=MINI))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert all(report.stages for report in reports())


def test_a_number_that_guards_leave_one_value_makes_no_second_length(eager_pieces: None, stock_is_eager: None) -> None:
    """`x[:, -keep:]` for `keep = 0`, as a symbol, is all of `x`, and by PyTorch's arithmetic `tokens + keep` rows."""
    weights = weights_of(torch.float64)

    def run(x: torch.Tensor, keep: int) -> torch.Tensor:
        return ROWWISE["mlp"](x[:, -keep:], weights) @ weights.square

    compiled = torch.compile(run, backend="mom", options=MINI)
    for keep, tokens in ((3, 21), (0, 30), (0, 25), (17, 40), (0, 33)):
        x = torch.randn(2, tokens, HIDDEN, dtype=torch.float64)
        torch.testing.assert_close(compiled(x, keep), run(x, keep), rtol=0, atol=1e-10)
    few, none, many = reports()
    assert few.no_loops or few.fallback  # three rows are one mini-sequence
    assert none.stages and not none.work_outside
    assert many.stages and not many.work_outside
