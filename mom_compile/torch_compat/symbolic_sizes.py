"""Size symbols and fake tensors for compiling one graph on its own.

ShapeEnv             knows the symbols of a graph. Tracing and compiling add guards and replacements to it.
ConstantSource       the origin of a symbol, as guards print it
FakeTensorProp       computes the fake values of all nodes of a graph
TracingContext       the context of the graph that is compiled; `V.set_fake_mode` tells Inductor its fake mode
current_callable     of a `CompiledFxGraph`: the generated `call` function
eager_input_vals     in a node's metadata: the operands of a custom operator, from which Inductor takes strides
var_to_range         of a `ShapeEnv`: the least and greatest value of each symbol
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._guards import TracingContext, tracing
from torch._inductor import config as inductor_config
from torch._inductor.utils import BoxedBool
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._sympy.value_ranges import ValueRanges

from mom_compile.torch_compat.compile_cache import loaded_stock, stored_stock
from mom_compile.torch_compat.inductor import compile_inner
from mom_passes.graph.meta import meta_value


class SymbolicSizes:
    """A new set of size symbols, and fake tensors over them, to compile one piece.

    The user's graph has its own symbols. A piece gets new ones, so that layers, sequence lengths and graphs can share
    it, and so that its assumptions about them are known.
    """

    def __init__(self) -> None:
        self.env = ShapeEnv()
        # Name symbols s800, s801, ... By default PyTorch names them s0 to s99 by a hash. When Inductor writes
        # FlexAttention in C++, it replaces `ks2` as text, also within `ks24`.
        self.env.unique_ids.update(range(800))
        self.mode = FakeTensorMode(shape_env=self.env, allow_non_fake_inputs=True)
        self.symbols: dict[str, sympy.Symbol] = {}

    def size(self, name: str, hint: int, minimum: int) -> torch.SymInt:
        """Return a new symbol `name >= minimum` whose example value is `hint`."""
        source = ConstantSource(name)
        symbol = self.env.create_symbol(
            hint,
            source,
            dynamic_dim=DimDynamic.DYNAMIC,
            positive=True if minimum > 0 else None,
            do_not_specialize_zero_one=minimum < 2,
        )
        if minimum < 2:
            self.env.var_to_range[symbol] = ValueRanges(sympy.Integer(minimum), self.env.var_to_range[symbol].upper)
        self.symbols[name] = symbol
        made: Any = self.env.create_symintnode(symbol, hint=hint, source=source)
        return made

    def expression(self, value: sympy.Expr, hint: int) -> torch.SymInt | int:
        """Return the SymInt of an expression over this set's symbols."""
        if value.is_Integer:
            return int(value)
        return self.env.create_symintnode(value, hint=hint)

    def tensor(self, shape: Sequence[Any], stride: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Any:
        with self.mode:
            return torch.empty_strided(tuple(shape), tuple(stride), dtype=dtype, device=device)

    def propagate(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
        """Set the fake value of every node, and the `eager_input_vals` of custom operators.

        As captured, `eager_input_vals` contain symbols of the user's graph.
        """
        FakeTensorProp(gm, mode=self.mode).propagate_dont_convert_inputs(*inputs)
        for node in gm.graph.nodes:
            if "eager_input_vals" in node.meta:
                node.meta["eager_input_vals"] = fx.map_arg((node.args, node.kwargs), lambda arg: meta_value(arg))

    def assumptions(self) -> list[sympy.Basic]:
        """Return the conditions on the symbols that tracing and compiling relied on so far."""
        conditions = [guard.expr for guard in self.env.guards]
        conditions += [sympy.Eq(a, b) for a, b in self.env.replacements.items() if a in self.symbols.values()]
        return [c for c in conditions if c is not sympy.true]

    def compile(self, gm: fx.GraphModule, inputs: Sequence[Any], patches: dict[str, Any]) -> Callable[[list[Any]], Any]:
        """Compile one piece with Inductor's back half.

        CUDA graphs are off: a loop writes to a new place in each iteration. Buffer reuse is off: Inductor keeps a
        buffer for a later one of the same size, and the buffer occupies memory while an attention operator between them
        needs temporaries. The caching allocator frees and allocates as fast.
        """
        with (
            tracing(TracingContext(self.mode)),
            V.set_fake_mode(self.mode),
            inductor_config.patch({"allow_buffer_reuse": False, **patches, "triton.cudagraphs": False}),
            torch.no_grad(),
        ):
            return _without_bookkeeping(compile_inner(gm, inputs, is_inference=True))


def _without_bookkeeping(compiled: Any) -> Callable[[list[Any]], Any]:
    """Return a callable that calls a `CompiledFxGraph` once and its `current_callable` afterwards.

    The first call ends the record of autotuned kernels. In a decode step of many pieces the bookkeeping of further
    calls costs more time than sharing pieces saves.
    """
    call: Callable[[list[Any]], Any] = compiled

    def run(inputs: list[Any]) -> Any:
        nonlocal call
        now, call = call, getattr(compiled, "current_callable", None) or compiled
        return now(inputs)

    run.compiled = compiled  # type: ignore[attr-defined]
    return run


def stored_piece(run: Any) -> Any:
    """Return a picklable reference to a compiled piece: its key in FxGraphCache. Raises `NotStorable`."""
    return stored_stock(getattr(run, "compiled", None))


def loaded_piece(stored: Any) -> Callable[[list[Any]], Any]:
    """Read a piece that `SymbolicSizes.compile` made, by its key. Raises if FxGraphCache has no such entry."""
    settings = {"cudagraphs": BoxedBool(False), "boxed_forward_device_index": None, "is_backward": False}
    # With a context of its own: the context of the graph that is captured would record the strides of the piece.
    with tracing(TracingContext(FakeTensorMode(shape_env=ShapeEnv()))), torch.no_grad():
        return _without_bookkeeping(loaded_stock(stored, (), settings))


def least_value(size: torch.SymInt) -> int:
    """Return the least value of a symbol (2 for sizes that Dynamo makes dynamic)."""
    bounds = size.node.shape_env.var_to_range.get(size.node.expr)
    lower = bounds.lower if bounds is not None else 0
    return int(lower) if getattr(lower, "is_Integer", False) else 0


def bounds_of(size: torch.SymInt) -> tuple[int, int | None]:
    """Return the least and the greatest value that a graph's guards allow a symbol; None: there is no greatest."""
    bounds = size.node.shape_env.var_to_range.get(size.node.expr)
    most: Any = getattr(bounds, "upper", None)
    return least_value(size), int(most) if getattr(most, "is_Integer", False) else None
