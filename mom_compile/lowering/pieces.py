"""A graph that is compiled once and used in many places: a loop body, or the operators between two loops.

Terms
-----
piece      A graph over its inputs alone, with sizes as symbols of its own.
variant    One compilation of a piece, with the conditions on sizes that it relies on (mostly none).
order      The dimensions of a result from the outermost in storage to the innermost. Readers of the result rely on it.

Several threads may run a piece. A run with known sizes takes no lock: it reads `chosen`. Code that compiles, waits for
compilers or changes `variants` holds `COMPILING`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from mom_compile.lowering.decomposed import decompose
from mom_compile.lowering.eager import first_line, refuse_or_warn, run_eagerly
from mom_compile.lowering.once import is_worthwhile, store_once
from mom_compile.lowering.results import lay_out_results
from mom_compile.lowering.templates import SizeTemplate, SymbolFacts, Template, TensorTemplate
from mom_compile.progress import compiling
from mom_compile.torch_compat.compile_cache import NotStorable
from mom_compile.torch_compat.cpp_kernels import defer_kernel_waits
from mom_compile.torch_compat.dynamo import COMPILING
from mom_compile.torch_compat.inductor import CodegenSettings, inductor_configured
from mom_compile.torch_compat.symbolic_sizes import SymbolicSizes, loaded_piece, stored_piece
from mom_compile.torch_compat.tensors import assert_layout
from mom_passes.attention.flex import restore_flex_attention
from mom_passes.graph.edit import copy_graph
from mom_passes.graph.size_values import SizeFunction, function_of
from mom_passes.graph.structure import lines_of
from mom_passes.loops.ports import COUNT
from mom_passes.source_lines import source_range
from mom_passes.torch_compat import graph_module

log = logging.getLogger(__name__)


#: The most combinations of sizes whose variant a piece remembers. With more it forgets all and checks conditions again.
MOST_CHOSEN = 4096


@dataclass(frozen=True)
class Conditions:
    """The conditions on sizes that a variant relies on, as compiled functions of the symbols of its piece.

    A run with new sizes evaluates them. With sympy that would take a fifth of a millisecond.
    """

    functions: tuple[SizeFunction, ...]

    @staticmethod
    def of(assumed: Sequence[sympy.Basic], symbols: Sequence[sympy.Symbol]) -> Conditions | None:
        """Return None if nothing is assumed: the variant holds for all sizes."""
        return Conditions(tuple(function_of(a, symbols) for a in assumed)) if assumed else None

    def __call__(self, values: Sequence[int]) -> bool:
        return all(function(values) for function in self.functions)


@dataclass
class Variant:
    run: Callable[[list[Any]], Any]
    #: None: the variant holds for all sizes.
    holds: Conditions | None
    #: The error of Inductor, if the variant runs eagerly.
    eager_reason: str | None = None


@dataclass
class Piece:
    """A compiled piece. `piece(inputs)` may empty the list.

    The first `len(symbols)` inputs are the values of its symbols, in order. Pickled, a piece is its graph, with the
    keys of its variants in Inductor's cache.
    """

    gm: fx.GraphModule
    templates: tuple[Template, ...]
    symbols: dict[sympy.Symbol, SymbolFacts]
    patches: Mapping[str, Any]
    settings: CodegenSettings | None = None
    #: Raise for a variant that would run eagerly.
    strict: bool = False
    variants: list[Variant] = field(default_factory=list)
    chosen: dict[tuple[int, ...], Callable[[list[Any]], Any]] = field(default_factory=dict)
    #: Waits for the C++ compilers of the newest variant.
    unfinished: list[Callable[[], None]] = field(default_factory=list)
    #: Of an unpickled piece: the key of each variant in Inductor's cache, with the conditions of the variant.
    kept: list[tuple[Any, Conditions | None]] = field(default_factory=list)
    #: For each result that its readers expect dense: the order. None: the strides that its operator returns.
    orders: tuple[tuple[int, ...] | None, ...] = ()

    def __call__(self, inputs: list[Any]) -> Any:
        values = tuple(inputs[: len(self.symbols)])
        run = self.chosen.get(values)
        if run is None:
            run = self._choose(values)
        return run(inputs)

    def check(self, inputs: Sequence[Any]) -> None:
        """Raise `AssertionError` if an input has other sizes or strides than compiled code assumes.

        Compiled code checks this itself, except for a loop body: a loop checks once for all its mini-sequences.
        """
        functions, layouts = self._layouts
        values = inputs[: len(self.symbols)]
        sizes = [function(values) for function in functions]
        for value, layout in zip(inputs, layouts, strict=True):
            if layout is not None:
                shape, stride = layout
                assert_layout(value, tuple([sizes[i] for i in shape]), tuple([sizes[i] for i in stride]))

    @functools.cached_property
    def _layouts(self) -> tuple[list[SizeFunction], list[tuple[list[int], list[int]] | None]]:
        """Return the distinct sizes, and for each tensor the indices of its shape and strides among them."""
        known: dict[sympy.Expr, int] = {}

        def numbers(sizes: Sequence[sympy.Expr]) -> list[int]:
            return [known.setdefault(size, len(known)) for size in sizes]

        tensors = (t if isinstance(t, TensorTemplate) else None for t in self.templates)
        layouts = [None if t is None else (numbers(t.shape), numbers(t.stride)) for t in tensors]
        return [function_of(size, list(self.symbols)) for size in known], layouts

    # --- pickling ---

    def __getstate__(self) -> dict[str, Any]:
        state = {"graph": self.gm.graph, "templates": self.templates, "symbols": self.symbols}
        state |= {"patches": dict(self.patches), "orders": self.orders, "strict": self.strict}
        return {**state, "kept": self.kept or self._stored()}

    def _stored(self) -> list[tuple[Any, Conditions | None]]:
        """Return the keys of all variants, or none if Inductor's cache lacks one: then all are compiled anew."""
        try:
            return [(stored_piece(variant.run), variant.holds) for variant in self.variants]
        except NotStorable:
            return []

    def __setstate__(self, state: dict[str, Any]) -> None:
        gm = graph_module(torch.nn.Module(), state["graph"])
        self.__init__(gm, state["templates"], state["symbols"], state["patches"])  # type: ignore[misc]
        self.kept, self.orders, self.strict = state["kept"], state["orders"], state["strict"]

    def key(self) -> str:
        return structural_key(self.gm.graph, self.templates, self.patches, self.symbols, self.orders)

    # --- compiling ---

    @property
    def _devices(self) -> set[torch.device]:
        return {template.device for template in self.templates if isinstance(template, TensorTemplate)}

    def make(self) -> None:
        """Read the variants from Inductor's cache, or compile one. `finish` has to be called afterwards."""
        try:
            self.variants = [Variant(loaded_piece(stored), holds) for stored, holds in self.kept]
        except Exception:
            log.debug("a piece is not in Inductor's cache any more", exc_info=True)
        self.kept = []
        if not self.variants:
            self.compile()

    def compile(self, hints: Mapping[sympy.Symbol, int] | None = None) -> None:
        """Add a variant for sizes like `hints`. A variant that Inductor cannot compile runs eagerly, with the reason.

        On a CPU, C++ compilers may still be running when this returns: `finish` waits for them. The caller holds
        `COMPILING`.
        """
        self.finish()
        sizes = SymbolicSizes()
        try:
            inputs = self._fake_inputs(sizes, hints or {})
            sizes.propagate(self.gm, inputs)
            lay_out_results(self.gm, self.orders)
            assert self.settings is not None, "a piece is compiled with the settings of the graph it belongs to"
            with inductor_configured(self.settings), defer_kernel_waits(self._devices) as waits:
                # Inductor rewrites what it compiles. Eager runs and further variants need the original.
                gm = restore_flex_attention(copy_graph(self.gm))
                decompose(gm, sizes.mode)
                # Only in loop bodies: in a decode step another kernel would cost more time than it saves.
                if COUNT in self.symbols and is_worthwhile(self._devices):
                    store_once(gm.graph)
                run = sizes.compile(gm, inputs, dict(self.patches))
        except Exception as error:
            self.variants.append(self._eager(error))
            return
        self.variants.append(Variant(run, self._condition(sizes)))
        self.unfinished = waits

    def finish(self) -> None:
        """Wait for the C++ compilers. A variant that does not compile runs eagerly, with the reason."""
        with COMPILING:
            try:
                while self.unfinished:  # an interrupted wait is repeated by the next call
                    self.unfinished[0]()
                    del self.unfinished[0]
            except Exception as error:
                self.unfinished = []
                self.variants[-1] = self._eager(error)

    def _eager(self, error: Exception) -> Variant:
        log.debug("Inductor could not compile a piece", exc_info=error)
        return Variant(self.run_eagerly, None, first_line(error))

    @property
    def eager_reason(self) -> str | None:
        """The error of Inductor, if some sizes run eagerly."""
        return next((variant.eager_reason for variant in self.variants if variant.eager_reason is not None), None)

    def run_eagerly(self, inputs: list[Any]) -> Any:
        return run_eagerly(self.gm, inputs)

    def _fake_inputs(self, sizes: SymbolicSizes, hints: Mapping[sympy.Symbol, int]) -> list[Any]:
        own: dict[sympy.Symbol, sympy.Symbol] = {}
        for symbol, facts in self.symbols.items():
            sizes.size(symbol.name, hints.get(symbol, facts.hint), facts.minimum)
            own[symbol] = sizes.symbols[symbol.name]
        example = {own[s]: hints.get(s, f.hint) for s, f in self.symbols.items()}

        def size(value: sympy.Expr) -> Any:
            mine = value.xreplace(own)
            return sizes.expression(mine, int(mine.xreplace(example)))

        made: list[Any] = []
        for template in self.templates:
            if isinstance(template, SizeTemplate):
                made.append(size(template.value))
            else:
                shape, stride = [size(s) for s in template.shape], [size(s) for s in template.stride]
                made.append(sizes.tensor(shape, stride, template.dtype, template.device))
        return made

    def _condition(self, sizes: SymbolicSizes) -> Conditions | None:
        own = {sizes.symbols[s.name]: s for s in self.symbols}
        assumed = [condition.xreplace(own) for condition in sizes.assumptions()]
        if assumed:
            log.debug("a compiled piece relies on %s", assumed)
        return Conditions.of(assumed, list(self.symbols))

    # --- choosing a variant ---

    def _choose(self, values: tuple[int, ...]) -> Callable[[list[Any]], Any]:
        """Return the code for sizes that no run has had yet, compiled if needed."""
        with COMPILING:
            run = self.chosen.get(values)  # another thread may have set it while this one waited
            if run is None:
                run = self._code_for(values)
                if len(self.chosen) >= MOST_CHOSEN:
                    self.chosen.clear()
                self.chosen[values] = run
        return run

    def _code_for(self, values: tuple[int, ...]) -> Callable[[list[Any]], Any]:
        self.finish()
        facts = self.symbols.values()
        if any(value < fact.minimum for value, fact in zip(values, facts, strict=True)):
            # Compiled code assumes sizes of at least two: Inductor specialises on one.
            return self.run_eagerly
        for variant in self.variants:
            if variant.holds is None or variant.holds(values):
                return variant.run
        log.debug("sizes %s break a condition of the compiled piece: compiling it for them", values)
        new = len(self.variants)
        with compiling("code for further sizes"):
            self.compile(dict(zip(self.symbols, values, strict=True)))
            self.finish()
        reason = self.variants[new].eager_reason
        if reason is not None and self.strict:
            del self.variants[new]  # no later call may run it
        if reason is not None:
            refuse_or_warn(reason, source_range(self.gm.graph), self.strict)
        return self.variants[new].run


def structural_key(
    graph: fx.Graph,
    templates: Sequence[Template],
    patches: Mapping[str, Any],
    symbols: Mapping[sympy.Symbol, Any],
    orders: Sequence[Any] = (),
) -> str:
    """Return a key that is equal for graphs with the same operators and inputs, whatever the names of their nodes."""
    lines = [repr(sorted(patches.items(), key=str)), repr([s.name for s in symbols]), repr(list(templates))]
    lines += [repr([fact.minimum for fact in symbols.values()]), repr(orders)]
    # `lines_of` prints some objects by id. The piece holds its graph, so no other object gets the same id.
    return "\n".join([*lines, *lines_of(graph)])
