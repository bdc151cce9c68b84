"""Code that Inductor cannot compile runs eagerly, and is reported. A piece is an error with `strict=True`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from mom_compile.notices import warn_of_eager
from mom_compile.report.facts import PieceLog
from mom_compile.torch_compat.inductor import mark_boxed
from mom_passes.graph.edit import copy_graph

log = logging.getLogger(__name__)

#: The name in a report of a graph that stock Inductor could not compile.
THE_GRAPH = "the graph"


class NotCompiled(RuntimeError):
    """Inductor cannot compile a piece, and `strict=True` forbids eager pieces."""

    def __init__(self, reasons: Mapping[str, str]) -> None:
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        super().__init__(f"Inductor could not compile {listed}. Without strict=True this runs eagerly")


def first_line(error: Exception) -> str:
    """Return the type of an error and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


def run_eagerly(gm: fx.GraphModule, inputs: list[Any]) -> Any:
    """Run a captured graph node by node. Empties `inputs`, as compiled code does."""
    values = list(inputs)
    inputs.clear()
    return gm(*values)


def stock_or_eager(
    gm: fx.GraphModule, example_inputs: Sequence[Any], pieces: PieceLog, stock: Callable[..., Any]
) -> Callable[[list[Any]], Any]:
    """Compile a graph with stock Inductor. A graph that it cannot compile runs as captured, like one of our pieces.

    On a CPU, Inductor 2.11 writes C++ that does not compile for the decode steps of Llama, Gemma 3 and GPT-2.
    """
    original = copy_graph(gm)  # Inductor rewrites what it compiles
    try:
        return stock(gm, example_inputs)  # type: ignore[no-any-return]
    except Exception as error:
        log.debug("stock Inductor could not compile a graph", exc_info=True)
        pieces.eager_pieces[THE_GRAPH] = first_line(error)

    def run(inputs: list[Any]) -> Any:
        return run_eagerly(original, inputs)

    return mark_boxed(run)


def refuse_or_warn(reason: str, lines: str | None, strict: bool) -> None:
    """Warn that code failed to compile while a program ran, or raise `NotCompiled` if `strict`.

    Reports are made before a program runs and do not contain this reason.

    Parameters
    ----------
    lines
        The user's lines that the code was compiled from, if they are known.
    """
    what = "a piece for other sizes" + (f" ({lines})" if lines is not None else "")
    if strict:
        raise NotCompiled({what: reason})
    warn_of_eager(what, reason)
