"""What a program is cut into: what may cross from one piece to another, and when two pieces are the same."""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sympy
import torch
from torch import fx
from torch._inductor import config as inductor_config
from torch._subclasses.fake_tensor import FakeTensorMode

from mom_compile import reports
from mom_compile.config import parse_options
from mom_compile.lowering.piece_cache import PieceCache
from mom_compile.lowering.pieces import Piece, structural_key
from mom_compile.lowering.templates import SizeTemplate, SymbolFacts, TensorTemplate
from mom_compile.report.facts import PieceLog
from mom_compile.skip import why_stock
from mom_compile.torch_compat.inductor import codegen_settings
from mom_passes.loops.ports import COUNT
from tests.programs import ATTENTION, HIDDEN, ROWWISE, weights_of

W = weights_of(torch.float64)
MINI = {"mini_seq_len": 8, "strict": True}
aten = torch.ops.aten


def block(x: torch.Tensor) -> torch.Tensor:
    return ROWWISE["mlp"](ATTENTION["causal"](x, W), W)


def inputs(tokens: int = 40) -> torch.Tensor:
    return torch.randn(2, tokens, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(tokens))


# --- several results at once ---


@torch.library.custom_op("mom_tests::both", mutates_args=())
def both(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x * 2, x + 1


@both.register_fake
def _(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@torch.library.custom_op("mom_tests::parts", mutates_args=())
def parts(x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    return x.mean(1, keepdim=True), [x * 2, x + 1]


@parts.register_fake
def _(x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    return x.new_empty(x.shape[0], 1, x.shape[2]), [torch.empty_like(x), torch.empty_like(x)]


@torch.library.custom_op("mom_tests::counted", mutates_args=("state",))
def counted(x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    state.add_(1)
    return x * 2


@counted.register_fake
def _(x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("mom_tests::filled", mutates_args=("state",))
def filled(x: torch.Tensor, state: torch.Tensor) -> None:
    state.copy_(x.mean(1))


@filled.register_fake
def _(x: torch.Tensor, state: torch.Tensor) -> None:
    return None


def topk(x: torch.Tensor) -> Any:
    values, where = block(x).topk(9, dim=1)
    return block(block(x + values.mean(1, keepdim=True))).gather(1, where)


def sort(x: torch.Tensor) -> Any:
    values, where = block(x).sort(dim=1)
    return block(block(x + values)).gather(1, where)


def maximum(x: torch.Tensor) -> Any:
    values, where = block(x).max(dim=1, keepdim=True)
    return block(block(x + values)).gather(1, where)


def split(x: torch.Tensor) -> Any:
    a, b, c = block(x).split([3, 8, x.shape[1] - 11], dim=1)
    y = block(x + a.mean(1, keepdim=True))
    return block(y + b.mean(1, keepdim=True)) + c.mean(1, keepdim=True)


def unbind(x: torch.Tensor) -> Any:
    a, b, c = block(x)[:, :3].flip(1).unbind(1)
    return block(block(x + a[:, None]) + b[:, None]) + c[:, None]


def two_results(x: torch.Tensor) -> Any:
    a, b = both(block(x))
    return block(block(x + a)) + b


def lists_of_results(x: torch.Tensor) -> Any:
    mean, (a, b) = parts(block(x))
    return block(block(x + a) + mean) + b


def counting(x: torch.Tensor) -> Any:
    state = x.mean(1)
    y = counted(block(x), state)
    return block(block(x + y)) + state[:, None]


def filling(x: torch.Tensor) -> Any:
    state = x.sum(1)
    filled(block(x), state)
    return block(block(x + state[:, None])) - state[:, None]


SEVERAL = [topk, sort, maximum, split, unbind, two_results, lists_of_results, counting, filling]


@pytest.mark.usefixtures("eager_pieces")
@pytest.mark.parametrize("program", SEVERAL)
def test_results_of_one_operator_may_be_read_in_different_pieces(program: Callable[..., Any]) -> None:
    with torch.no_grad():
        fast = torch.compile(program, backend="mom", dynamic=True, options=MINI)
        for tokens in (40, 61):
            torch.testing.assert_close(fast(inputs(tokens)), program(inputs(tokens)), rtol=1e-9, atol=1e-9)
    assert reports()[-1].stages


@pytest.mark.slow
@pytest.mark.parametrize("program", SEVERAL)
def test_compiled_results_of_one_operator_may_be_read_in_different_pieces(program: Callable[..., Any]) -> None:
    with torch.no_grad():
        fast = torch.compile(program, backend="mom", options=MINI)
        for tokens in (40, 61):
            torch.testing.assert_close(fast(inputs(tokens)), program(inputs(tokens)), rtol=1e-9, atol=1e-9)
    assert reports()[-1].stages and not reports()[-1].eager_pieces


@pytest.mark.usefixtures("eager_pieces")
def test_an_input_that_an_operator_writes_to_is_written_once() -> None:
    def program(x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        y = counted(block(x), state)
        return block(block(x + y)) + state

    fast = torch.compile(program, backend="mom", options=MINI)
    ours, expected = torch.zeros(HIDDEN, dtype=torch.float64), torch.zeros(HIDDEN, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(fast(inputs(), ours), program(inputs(), expected), rtol=1e-9, atol=1e-9)
    assert ours.tolist() == expected.tolist() == [3.0] * HIDDEN
    assert reports()[-1].stages


# --- what is stock Inductor's ---


@pytest.mark.usefixtures("stock_is_eager")
def test_a_graph_with_a_graph_of_its_own_is_stocks_by_name() -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        y = block(x)
        return block(torch.cond(y.sum() > 0, torch.sin, torch.cos, (y,)))

    with torch.no_grad():
        fast = torch.compile(program, backend="mom", options=MINI)
        torch.testing.assert_close(fast(inputs()), program(inputs()), rtol=1e-9, atol=1e-9)
    assert "cond" in str(reports()[-1].fallback) and "graph of its own" in str(reports()[-1].fallback)


@pytest.mark.usefixtures("eager_pieces", "stock_is_eager")
@pytest.mark.parametrize("tokens", [(40,), (40, 61)], ids=["one length", "all lengths"])
def test_nested_regions_are_put_in_their_places(tokens: tuple[int, ...]) -> None:
    region = torch.compiler.nested_compile_region(block)

    def program(x: torch.Tensor, call: Callable[[torch.Tensor], torch.Tensor] = region) -> torch.Tensor:
        return call(call(call(x)))

    with torch.no_grad():
        fast = torch.compile(program, backend="mom", options=MINI)
        for count in tokens:
            torch.testing.assert_close(fast(inputs(count)), program(inputs(count), block), rtol=1e-9, atol=1e-9)
    assert all(report.stages and not report.work_outside for report in reports())


@pytest.mark.usefixtures("stock_is_eager")
def test_numbers_that_products_depend_on_are_refused_with_what_to_do() -> None:
    def read(x: torch.Tensor) -> torch.Tensor:
        return block(block(x) * x[0, 0].argmax().item())

    x = inputs()
    with torch.no_grad(), torch._dynamo.config.patch(capture_scalar_outputs=True):
        torch.compile(read, backend="mom", options=MINI)(x)
        assert "capture_scalar_outputs = False" in str(reports()[-1].fallback)
        torch._dynamo.decorators.mark_unbacked(x, 1)
        torch.compile(lambda x: x * 2, backend="mom", options=MINI)(x)
        assert "mark_dynamic" in str(reports()[-1].fallback)


def _graph_on(*devices: str) -> fx.GraphModule:
    graph = fx.Graph()
    with FakeTensorMode():
        for i, device in enumerate(devices):
            graph.placeholder(f"x{i}").meta["val"] = torch.empty(2, 40, 8, device=device)
    graph.output(tuple(graph.nodes))
    return fx.GraphModule(torch.nn.Module(), graph)


def test_a_graph_on_several_accelerators_is_stocks_by_name() -> None:
    options, kwargs = parse_options(MINI), {"is_inference": True}
    assert why_stock(_graph_on("cpu", "xpu:0"), options, kwargs) is None
    reason = str(why_stock(_graph_on("xpu:0", "cpu", "xpu:1"), options, kwargs))
    assert reason == "the graph computes on several accelerators: xpu:0, xpu:1"


def test_meta_tensors_have_nothing_to_run_and_run_all_the_same() -> None:
    def program(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ w)

    with torch.no_grad():
        found = torch.compile(program, backend="mom", options=MINI)(
            torch.empty(2, 40, 8, device="meta"), torch.empty(8, 16, device="meta")
        )
    assert found.is_meta and found.shape == (2, 40, 16)
    assert "meta device" in str(reports()[-1].fallback) and not reports()[-1].failed


# --- when two pieces are the same ---


def _matmul_precision() -> Iterator[None]:
    before, precision = torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.fp32_precision
    torch.set_float32_matmul_precision("high" if before == "highest" else "highest")
    yield
    torch.set_float32_matmul_precision(before)
    torch.backends.cuda.matmul.fp32_precision = precision


def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    yield
    torch.set_num_threads(before)


def _default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


SETTINGS: dict[str, Callable[[], Any]] = {
    "config": lambda: inductor_config.patch(emulate_precision_casts=True),
    "nested config": lambda: inductor_config.patch({"cpp.simdlen": 1}),
    "private config": lambda: inductor_config.patch(_micro_pipeline_tp=True),
    "a pass of the user's": lambda: inductor_config.patch(post_grad_custom_post_pass=lambda graph: None),
    "matmul precision": contextlib.contextmanager(_matmul_precision),
    "deterministic": contextlib.contextmanager(_deterministic),
    "threads": contextlib.contextmanager(_threads),
    "default dtype": contextlib.contextmanager(_default_dtype),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_change_code_change_the_key(name: str) -> None:
    before = codegen_settings().key
    assert codegen_settings().key == before
    with SETTINGS[name]():
        assert codegen_settings().key != before
    assert codegen_settings().key == before


def _same(x: torch.Tensor) -> torch.Tensor:
    return block(x)


@pytest.mark.usefixtures("eager_pieces")
def test_a_piece_is_shared_under_one_configuration_and_not_with_another() -> None:
    with torch.no_grad():
        torch.compile(block, backend="mom", options=MINI)(inputs())
        torch.compile(_same, backend="mom", options=MINI)(inputs())
        with inductor_config.patch(emulate_precision_casts=True):
            torch.compile(lambda x: block(x), backend="mom", options=MINI)(inputs())
    first, second, third = reports()
    assert second.bodies_shared == len(first.compiled_pieces) and not second.compiled_pieces
    assert third.compiled_pieces == first.compiled_pieces


@pytest.mark.usefixtures("eager_pieces")
def test_alike_layers_share_a_body_whose_operands_are_made_in_another_order() -> None:
    """The first layer reads what was there before the angles of positions; the others what was made behind them."""

    def decoder(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        x = ROWWISE["mlp"](x, W)
        turned = angles @ W.bias[:, None]  # a product, which is made once for all layers
        for _ in range(4):
            x = x + ATTENTION["causal"](x * turned, W)
        return x

    x, angles = inputs(40), inputs(40).flip(1)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(decoder, backend="mom", options=MINI)(x, angles), decoder(x, angles))
    report = reports()[-1]
    bodies = [name for name in report.compiled_pieces if name.startswith("stage")]
    assert len(report.stages) == 5
    assert len(bodies) == 3, "before the first attention, between two, behind the last"


@pytest.mark.usefixtures("eager_pieces")
@pytest.mark.parametrize("tokens", [9, 41, 400])
def test_a_body_is_tuned_for_a_mini_sequence_however_long_the_prompt(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hint of `count`: from it Inductor takes block sizes and how wide an index is. Never the length itself."""
    hints = []
    begin = PieceCache.begin

    def seen(cache: PieceCache, piece: Piece, *more: Any) -> Any:
        hints.extend(facts.hint for symbol, facts in piece.symbols.items() if symbol == COUNT)
        return begin(cache, piece, *more)

    monkeypatch.setattr(PieceCache, "begin", seen)
    with torch.no_grad():
        torch.compile(block, backend="mom", options=MINI)(inputs(tokens))
    assert hints and set(hints) == {MINI["mini_seq_len"]}


def test_a_later_variant_is_compiled_as_the_first_was(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        "mom_compile.torch_compat.inductor.compile_fx_inner",
        lambda gm, *_, **__: seen.append(inductor_config.emulate_precision_casts) or gm,
    )
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(aten.relu.default, (x,)),))
    four, one = sympy.Integer(4), sympy.Integer(1)
    shape = (TensorTemplate((four, four), (four, one), torch.float32, torch.device("cpu")),)
    with inductor_config.patch(emulate_precision_casts=True):
        piece = Piece(fx.GraphModule(torch.nn.Module(), graph), shape, {}, {})
        piece = PieceCache().get(piece, codegen_settings(), PieceLog(), "piece")
    piece.compile()
    assert seen == [True, True]


def _key(*args: Any, target: Any = aten.add.Tensor) -> str:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(target, (x, *args)),))
    return structural_key(graph, [], {}, {})


def test_arguments_that_differ_print_differently() -> None:
    told_apart = [
        0, 0.0, -0.0, False, None, 1, 1.0, True, math.nan, math.inf, -math.inf, 1 + 0j, "%0", "nan", "cpu", [0], (0,),
        torch.float32, torch.float64, torch.device("cpu"), torch.device("cuda"), torch.device("cuda", 0),
        torch.strided, torch.contiguous_format, torch.channels_last, torch.preserve_format, {"a": 1}, {"a": 1.0},
    ]  # fmt: skip
    keys = [_key(argument) for argument in told_apart]
    assert len(set(keys)) == len(keys)
    assert keys == [_key(argument) for argument in told_apart]


def test_operators_of_the_same_name_are_not_the_same() -> None:
    def operator_named_same() -> Any:
        class Operator:
            __name__ = "scale"

            def __call__(self, x: Any) -> Any:
                return x

            def __str__(self) -> str:
                return "mylib.scale.default"

        return Operator()

    one, other = operator_named_same(), operator_named_same()
    assert _key(target=one) != _key(target=other)
    assert _key(target=operator.neg) == _key(target=operator.neg)
    # Also where an operator is handed to another, as in a functionalised call.
    assert _key(one) != _key(other)
    assert _key(aten.add.Tensor) != _key(aten.add.Scalar)


def test_names_of_nodes_do_not_matter() -> None:
    def graph_of(name: str) -> fx.Graph:
        graph = fx.Graph()
        x = graph.placeholder(name)
        graph.output((graph.call_function(aten.relu.default, (x,)),))
        return graph

    assert structural_key(graph_of("a"), [], {}, {}) == structural_key(graph_of("b"), [], {}, {})


def test_what_a_size_may_be_is_part_of_the_key() -> None:
    n = sympy.Symbol("n0", integer=True, nonnegative=True)
    graph = fx.Graph()
    graph.output(())
    keys = {structural_key(graph, [SizeTemplate(n)], {}, {n: SymbolFacts(9, minimum)}) for minimum in (0, 1, 2)}
    assert len(keys) == 3
