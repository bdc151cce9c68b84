"""Pieces are compiled: operators that Inductor only decomposes, writes to inputs; and a word where one runs eagerly."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils._pytree import tree_map_only

from mom_compile import MomWarning, reports
from mom_compile.lowering.decomposed import decompose
from mom_compile.lowering.eager import NotCompiled
from mom_compile.lowering.piece_cache import PieceCache
from mom_compile.lowering.pieces import Piece
from mom_compile.lowering.templates import SizeTemplate, SymbolFacts, TensorTemplate
from mom_compile.report.facts import PieceLog
from mom_compile.torch_compat.decompositions import is_only_decomposed
from mom_compile.torch_compat.inductor import codegen_settings
from mom_compile.torch_compat.symbolic_sizes import SymbolicSizes
from mom_passes.ops.attention import MOM_ATTENTION
from mom_passes.rules.registry import registered
from tests.models import TinyDecoder, ids, tiny
from tests.rule_samples import Call, all_samples

aten = torch.ops.aten
CPU = torch.device("cpu")
N = sympy.Symbol("n0", integer=True, nonnegative=True)

# --- operators that Inductor decomposes and does not lower ---

ONLY_DECOMPOSED = [target for target in registered() if is_only_decomposed(target)]


def graph_of(call: Call) -> tuple[fx.GraphModule, list[torch.Tensor]]:
    """A sample call, or the first of what it returns, as a graph, and the tensors that it is given."""
    graph = fx.Graph()
    given: list[torch.Tensor] = []

    def read(value: torch.Tensor) -> fx.Node:
        given.append(value)
        return graph.placeholder(f"x{len(given)}")

    args, kwargs = tree_map_only(torch.Tensor, read, (call.args, call.kwargs))
    result = graph.call_function(call.target, tuple(args), dict(kwargs))
    several = len(call.target._schema.returns) > 1
    graph.output((graph.call_function(operator.getitem, (result, 0)) if several else result,))
    return fx.GraphModule(nn.Module(), graph), given


def test_operators_that_passes_emit_are_among_them() -> None:
    """Else the test below would hold of nothing."""
    assert {aten.arange.start, aten.index_select.default, aten.masked_fill.Scalar} <= set(ONLY_DECOMPOSED)
    assert not any(map(is_only_decomposed, (aten.add.Tensor, aten.mm.default, MOM_ATTENTION)))


@pytest.mark.parametrize("target", ONLY_DECOMPOSED, ids=str)
def test_a_decomposed_operator_computes_the_same(target: Any) -> None:
    gm, given = graph_of(all_samples()[target][0])
    expected = gm(*given)
    sizes = SymbolicSizes()
    sizes.propagate(gm, [sizes.mode.from_tensor(value, static_shapes=True) for value in given])
    assert decompose(gm, sizes.mode) == 1
    assert not any(is_only_decomposed(node.target) for node in gm.graph.nodes)
    torch.testing.assert_close(gm(*given), expected, rtol=1e-9, atol=1e-9, equal_nan=True)


def rows_graph() -> fx.Graph:
    """`x[:n]` where a mask is false, by operators that Inductor does not lower."""
    graph = fx.Graph()
    n, x, mask = (graph.placeholder(name) for name in ("n", "x", "mask"))
    numbers = graph.call_function(aten.arange.start, (0, n), {"device": CPU, "pin_memory": False})
    rows = graph.call_function(aten.index_select.default, (x, 0, numbers))
    graph.output((graph.call_function(aten.masked_fill.Scalar, (rows, mask, -1.0)),))
    return graph


def rows_piece(strict: bool = False) -> Piece:
    shape, one = (N, sympy.Integer(4)), sympy.Integer(1)
    of = [TensorTemplate(shape, (shape[1], one), dtype, CPU) for dtype in (torch.float32, torch.bool)]
    symbols = {N: SymbolFacts(6, 2)}
    return Piece(fx.GraphModule(nn.Module(), rows_graph()), (SizeTemplate(N), *of), symbols, {}, strict=strict)


def test_a_piece_with_such_operators_is_compiled() -> None:
    report = PieceLog()
    piece = PieceCache().get(rows_piece(), codegen_settings(), report, "piece")
    assert not report.eager_pieces
    for rows in (6, 9):
        x = torch.randn(rows, 4)
        (found,) = piece([rows, x, x > 0])
        torch.testing.assert_close(found, x.masked_fill(x > 0, -1.0))
    assert all(variant.run != piece.run_eagerly for variant in piece.variants)


@pytest.mark.slow
def test_a_padded_batch_of_a_second_length_has_no_eager_piece() -> None:
    """The mask's length is then a symbol of its own: which of its entries are read is computed."""
    model = tiny("Llama", num_hidden_layers=1)
    model.compile(backend="mom", options={"mini_seq_len": 16, "strict": True})
    for tokens in (64, 96):
        mask = torch.ones(2, tokens, dtype=torch.int64)
        mask[0, :9] = 0
        given = {"input_ids": ids(2, tokens), "attention_mask": mask, "use_cache": False}
        with torch.no_grad():
            found, expected = model(**given).logits, model.forward(**given).logits
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)
    assert len(reports()) == 2 and all(report.stages and not report.eager_pieces for report in reports())


# --- writes to inputs ---


class PostNormed(nn.Module):
    """A layer whose results are normed before they are added, and a last norm: the residual stream lives once."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.inner, self.up, self.down = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.scale = nn.Parameter(torch.rand(width))

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.scale)

    def layer(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.norm(x).unflatten(-1, (4, -1)).transpose(1, 2)
        attended = F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        x = x + self.norm(self.inner(attended.transpose(1, 2).flatten(2)))
        return x + self.norm(self.down(F.silu(self.up(self.norm(x)))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.layer(self.layer(x)))


def test_a_write_behind_the_reads_of_an_input_is_compiled() -> None:
    torch.manual_seed(0)
    model, x = PostNormed().eval(), torch.randn(1, 50, 32)
    with torch.no_grad():
        found = torch.compile(model, backend="mom", options={"mini_seq_len": 16, "strict": True})(x)
        torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-4)
    assert reports()[-1].stages and not reports()[-1].eager_pieces


# --- a word where one runs eagerly ---


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Inductor refuses every piece as long as the list has anything."""
    now: list[bool] = []
    compiling = SymbolicSizes.compile

    def compile(self: SymbolicSizes, gm: Any, inputs: Any, patches: Any) -> Any:
        if now:
            raise RuntimeError("undeclared temporary")
        return compiling(self, gm, inputs, patches)

    monkeypatch.setattr(SymbolicSizes, "compile", compile)
    return now


def test_a_piece_that_inductor_refuses_is_an_error_under_strict(broken: list[bool]) -> None:
    broken.append(True)
    model = TinyDecoder(layers=1).eval()
    model.compile(backend="mom", options={"mini_seq_len": 8, "strict": True})
    with torch.no_grad(), pytest.raises(Exception, match=r"could not compile .*undeclared temporary.*strict=True"):
        model(ids(1, 20))


def test_it_is_said_once_otherwise(broken: list[bool]) -> None:
    broken.append(True)
    model = TinyDecoder(layers=2).eval()
    model.compile(backend="mom", options={"mini_seq_len": 8})
    with torch.no_grad(), pytest.warns(MomWarning, match="runs eagerly: RuntimeError: undeclared") as caught:
        torch.testing.assert_close(model(ids(1, 20)), model.forward(ids(1, 20)), rtol=1e-4, atol=1e-4)
    assert sum(warning.category is MomWarning for warning in caught) == 1
    assert len(reports()[-1].eager_pieces) > 1


@pytest.mark.parametrize("strict", [True, False])
def test_a_later_variant_that_inductor_refuses_is_no_secret(strict: bool, broken: list[bool]) -> None:
    """It is compiled while a program runs, and is in no report."""
    made = rows_piece(strict)
    piece = PieceCache().get(made, codegen_settings(), PieceLog(), "piece")
    piece.variants[0].holds = lambda values: values[0] < 8  # type: ignore[assignment]
    broken.append(True)
    x = torch.randn(9, 4)
    if strict:
        for _ in range(2):
            with pytest.raises(NotCompiled, match="undeclared temporary"):
                piece([9, x, x > 0])
        return
    with pytest.warns(MomWarning, match="undeclared temporary"):
        (found,) = piece([9, x, x > 0])
    torch.testing.assert_close(found, x.masked_fill(x > 0, -1.0))


def test_strict_graphs_share_no_piece_with_others() -> None:
    cache, report = PieceCache(), PieceLog()
    found = [cache.begin(rows_piece(strict), codegen_settings(), report, "piece") for strict in (True, False, True)]
    assert found[0] is found[2] and found[0] is not found[1]
