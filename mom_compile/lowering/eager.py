"""Pieces that Inductor cannot compile run eagerly, and are reported. With `strict=True` they are an error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from mom_compile.notices import warn_of_eager


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
