"""What Inductor cannot compile runs eagerly, with the reason; under `strict=True` it is an error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from mom_compile.notices import warn_of_eager


class NotCompiled(RuntimeError):
    """Inductor cannot compile a piece, and `strict=True` allows no eager piece."""

    def __init__(self, reasons: Mapping[str, str]) -> None:
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        super().__init__(f"Inductor could not compile {listed}. Without strict=True this runs eagerly")


def first_line(error: Exception) -> str:
    """What kind of error it is, and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


def run_eagerly(gm: fx.GraphModule, inputs: list[Any]) -> Any:
    """Node by node, as captured. Empties `inputs`, as compiled code may."""
    values = list(inputs)
    inputs.clear()
    return gm(*values)


def refuse_or_warn(reason: str, strict: bool) -> None:
    """Of code that was compiled while a program ran, which is in no report. Raises `NotCompiled` under `strict`."""
    if strict:
        raise NotCompiled({"a piece for other sizes": reason})
    warn_of_eager("a piece for other sizes", reason)
