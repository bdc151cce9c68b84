"""One graph to compile once and use in many places: a loop body, or a straight run of operators.

Terms
-----
piece      A graph over its inputs alone, with sizes as symbols of its own.
template   What a piece assumes of one input: a size, or a tensor's dtype, device, sizes and strides.
variant    One compilation of a piece, with the conditions on sizes it relies on (mostly none).
order      Of a result: its dimensions from the outermost in storage to the innermost. Readers of the result rely on it.

Several threads may run a piece. A run whose sizes the piece has seen takes no lock: it reads `chosen`. Everything that
compiles, waits for compilers or changes `variants` holds `COMPILING`.

Layers of a decoder are the same graph with other weights, so pieces are shared by structure:
the key is the graph, with names and symbols numbered in order of appearance, and its templates.
"""

from __future__ import annotations

import functools
import logging
import time
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
from mom_compile.progress import advance, compiling
from mom_compile.report.facts import PieceLog
from mom_compile.torch_compat import (
    COMPILING,
    CodegenSettings,
    NotStorable,
    SymbolicSizes,
    assert_layout,
    inductor_as_of,
    kernels_later,
    loaded_piece,
    stored_piece,
)
from mom_passes.attention.flex import graphs_put_back
from mom_passes.graph.edit import copy_graph
from mom_passes.graph.size_values import SizeFunction, function_of
from mom_passes.graph.structure import lines_of
from mom_passes.loops.ports import COUNT

log = logging.getLogger(__name__)


#: Sizes for which a piece remembers its code. Beyond that it looks again.
MOST_CHOSEN = 4096


@dataclass(frozen=True)
class SizeTemplate:
    value: sympy.Expr


@dataclass(frozen=True)
class TensorTemplate:
    shape: tuple[sympy.Expr, ...]
    stride: tuple[sympy.Expr, ...]
    dtype: torch.dtype
    device: torch.device


Template = SizeTemplate | TensorTemplate


@dataclass(frozen=True)
class SymbolFacts:
    """What is known of a symbol: its example value and the least it can be."""

    hint: int
    minimum: int


@dataclass(frozen=True)
class Conditions:
    """What compiled code relies on, in the symbols of its piece. It is asked for all sizes that a run has not seen:
    sympy itself would take a fifth of a millisecond."""

    functions: tuple[SizeFunction, ...]

    @staticmethod
    def of(assumed: Sequence[sympy.Basic], symbols: Sequence[sympy.Symbol]) -> Conditions | None:
        """None: it holds for all sizes."""
        return Conditions(tuple(function_of(a, symbols) for a in assumed)) if assumed else None

    def __call__(self, values: Sequence[int]) -> bool:
        return all(function(values) for function in self.functions)


@dataclass
class Variant:
    run: Callable[[list[Any]], Any]
    #: None: holds for all sizes.
    holds: Conditions | None
    #: Why it runs eagerly, where Inductor could not compile it.
    eager_reason: str | None = None


@dataclass
class Piece:
    """A compiled piece. `piece(inputs)` may empty the list.

    The first `len(symbols)` inputs are the values of its symbols, in order. It is pickled as what is to be compiled,
    with the keys of what has been.
    """

    gm: fx.GraphModule
    templates: tuple[Template, ...]
    symbols: dict[sympy.Symbol, SymbolFacts]
    patches: Mapping[str, Any]
    settings: CodegenSettings | None = None
    #: Whether a variant that runs eagerly is an error.
    strict: bool = False
    variants: list[Variant] = field(default_factory=list)
    chosen: dict[tuple[int, ...], Callable[[list[Any]], Any]] = field(default_factory=dict)
    #: What the newest variant still waits for: C++ compilers at work.
    unfinished: list[Callable[[], None]] = field(default_factory=list)
    #: Of a piece that was read: what stands in Inductor's cache for each variant, with its conditions.
    kept: list[tuple[Any, Conditions | None]] = field(default_factory=list)
    #: Of each result that its readers expect dense, the order; None: the strides that its operator gives it.
    orders: tuple[tuple[int, ...] | None, ...] = ()

    def __call__(self, inputs: list[Any]) -> Any:
        values = tuple(inputs[: len(self.symbols)])
        run = self.chosen.get(values)
        if run is None:
            run = self._choose(values)
        return run(inputs)

    def check(self, inputs: Sequence[Any]) -> None:
        """Raises `AssertionError` where an input is laid out otherwise than compiled code takes for granted. It checks
        that itself, unless it is a loop's body: a loop asks once for all its mini-sequences."""
        functions, layouts = self._layouts
        values = inputs[: len(self.symbols)]
        sizes = [function(values) for function in functions]
        for value, layout in zip(inputs, layouts, strict=True):
            if layout is not None:
                shape, stride = layout
                assert_layout(value, tuple([sizes[i] for i in shape]), tuple([sizes[i] for i in stride]))

    @functools.cached_property
    def _layouts(self) -> tuple[list[SizeFunction], list[tuple[list[int], list[int]] | None]]:
        """Distinct sizes, and of each tensor which of them are its shape and strides."""
        known: dict[sympy.Expr, int] = {}

        def numbers(sizes: Sequence[sympy.Expr]) -> list[int]:
            return [known.setdefault(size, len(known)) for size in sizes]

        tensors = (t if isinstance(t, TensorTemplate) else None for t in self.templates)
        layouts = [None if t is None else (numbers(t.shape), numbers(t.stride)) for t in tensors]
        return [function_of(size, list(self.symbols)) for size in known], layouts

    def __getstate__(self) -> dict[str, Any]:
        what = {"graph": self.gm.graph, "templates": self.templates, "symbols": self.symbols}
        what |= {"patches": dict(self.patches), "orders": self.orders, "strict": self.strict}
        return {**what, "kept": self.kept or self._stored()}

    def _stored(self) -> list[tuple[Any, Conditions | None]]:
        """Nothing where Inductor's cache has not all of it: it will be compiled."""
        try:
            return [(stored_piece(variant.run), variant.holds) for variant in self.variants]
        except NotStorable:
            return []

    def __setstate__(self, state: dict[str, Any]) -> None:
        gm = fx.GraphModule(torch.nn.Module(), state["graph"])
        self.__init__(gm, state["templates"], state["symbols"], state["patches"])  # type: ignore[misc]
        self.kept, self.orders, self.strict = state["kept"], state["orders"], state["strict"]

    @property
    def _devices(self) -> set[torch.device]:
        return {template.device for template in self.templates if isinstance(template, TensorTemplate)}

    def key(self) -> str:
        return structural_key(self.gm.graph, self.templates, self.patches, self.symbols, self.orders)

    def make(self) -> None:
        """Read from Inductor's cache what an earlier process compiled, or compile it. To be finished."""
        try:
            self.variants = [Variant(loaded_piece(stored), holds) for stored, holds in self.kept]
        except Exception:
            log.debug("a piece is not in Inductor's cache any more", exc_info=True)
        self.kept = []
        if not self.variants:
            self.compile()

    def compile(self, hints: Mapping[sympy.Symbol, int] | None = None) -> None:
        """Add a variant, for sizes like `hints`. What Inductor cannot compile runs eagerly, with the reason.

        On a CPU C++ compilers may still be at work when this returns: `finish` waits for them. The caller holds
        `COMPILING`.
        """
        self.finish()
        sizes = SymbolicSizes()
        try:
            inputs = self._fake_inputs(sizes, hints or {})
            sizes.propagate(self.gm, inputs)
            lay_out_results(self.gm, self.orders)
            assert self.settings is not None, "a piece is compiled with the settings of the graph it belongs to"
            with inductor_as_of(self.settings), kernels_later(self._devices) as waits:
                # Inductor rewrites what it compiles; the original stays for eager runs and further variants.
                gm = graphs_put_back(copy_graph(self.gm))
                decompose(gm, sizes.mode)
                # In a loop's body: in a decode step a kernel more would take longer.
                if COUNT in self.symbols and is_worthwhile(self._devices):
                    store_once(gm.graph)
                run = sizes.compile(gm, inputs, dict(self.patches))
        except Exception as error:
            self.variants.append(self._eager(error))
            return
        self.variants.append(Variant(run, self._condition(sizes)))
        self.unfinished = waits

    def finish(self) -> None:
        """Wait for the C++ compilers. What does not compile runs eagerly, with the reason."""
        with COMPILING:
            try:
                while self.unfinished:  # what an interrupt leaves is waited for the next time
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
        """Why some sizes run eagerly, where Inductor could not compile the piece for them."""
        return next((variant.eager_reason for variant in self.variants if variant.eager_reason is not None), None)

    def run_eagerly(self, inputs: list[Any]) -> Any:
        return run_eagerly(self.gm, inputs)

    def _choose(self, values: tuple[int, ...]) -> Callable[[list[Any]], Any]:
        """The code for sizes that no run has had yet, compiled if need be."""
        with COMPILING:
            run = self.chosen.get(values)  # another thread may have been here while this one waited
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
            # Compiled code assumes sizes of two and more (it would have specialised on one).
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
            del self.variants[new]  # nothing else may run it
        if reason is not None:
            refuse_or_warn(reason, self.strict)
        return self.variants[new].run

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


class PieceCache:
    """Pieces by structure, shared by all graphs of this process."""

    def __init__(self) -> None:
        self._pieces: dict[tuple[str, bool, str], Piece] = {}

    def get(self, piece: Piece, settings: CodegenSettings, report: PieceLog, name: str) -> Piece:
        """The piece that is like this one, which is not compiled: itself, compiled now, if it is new."""
        found = self.begin(piece, settings, report, name)
        self.finish(found, report, name)
        return found

    def begin(self, piece: Piece, settings: CodegenSettings, report: PieceLog, name: str) -> Piece:
        """The same, where C++ compilers may be at work on it: the next piece is made meanwhile."""
        key = (settings.key, piece.strict, piece.key())
        with COMPILING:
            found = self._pieces.get(key)
            if found is None:
                began = time.perf_counter()
                piece.settings = settings
                piece.make()
                seconds = time.perf_counter() - began
                report.compiled_pieces.append(name)
                report.compile_seconds += seconds
                log.debug("made %s in %.1f s", name, seconds)
                found = self._pieces[key] = piece
            else:
                report.bodies_shared += 1
                log.debug("%s shares a compiled piece", name)
        advance()
        return found

    def finish(self, found: Piece, report: PieceLog, name: str) -> None:
        """Wait for a piece, and report it where it runs eagerly."""
        began = time.perf_counter()
        found.finish()
        report.compile_seconds += time.perf_counter() - began
        advance()
        if found.eager_reason is not None:
            report.eager_pieces[name] = found.eager_reason

    def clear(self) -> None:
        self._pieces.clear()


def structural_key(
    graph: fx.Graph,
    templates: Sequence[Template],
    patches: Mapping[str, Any],
    symbols: Mapping[sympy.Symbol, Any],
    orders: Sequence[Any] = (),
) -> str:
    """Equal for graphs that compute the same from inputs of the same kind, whatever their nodes are called."""
    lines = [repr(sorted(patches.items(), key=str)), repr([s.name for s in symbols]), repr(list(templates))]
    lines += [repr([fact.minimum for fact in symbols.values()]), repr(orders)]
    # The piece holds what it was made from.
    return "\n".join([*lines, *lines_of(graph)])
