"""The scheme that a plan assumes for quantised weights, and the notes about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mom_compile.planning.configs import PlanError
from mom_compile.planning.quantised import Scheme, UnreadableError, scheme_of, scheme_of_bits
from mom_compile.planning.subject import Subject
from mom_compile.planning.weights import Weights
from mom_compile.report.units import in_units

#: The `weight_bits` of unquantised weights.
UNQUANTISED = 16


def assumed_scheme(given: Mapping[str, Any] | None, bits: int | None) -> tuple[Scheme | None, list[str]]:
    """Return the quantisation by a `quantization_config`, or by `bits` instead of it, and notes on it.

    Raises `PlanError` for invalid bits.
    """
    method = "" if given is None else f" ({given.get('quant_method') or 'no method named'})"
    if bits is not None:
        note = f"the checkpoint is quantised{method}; the plan uses weight_bits={bits} instead"
        instead = [] if given is None else [note]
        try:
            return (None if bits == UNQUANTISED else scheme_of_bits(bits)), instead
        except ValueError as error:
            raise PlanError(f"{error}, or {UNQUANTISED} for unquantised weights") from error
    if given is None:
        return None, []
    try:
        return scheme_of(given), []
    except UnreadableError as error:
        return None, [
            f"the checkpoint is quantised{method}, but its bytes are unknown: {error}. The plan uses unquantised "
            f"weights; weight_bits=4 (--weight-bits 4) plans 4 bits"
        ]


def quantisation_notes(scheme: Scheme | None, weights: Weights, subject: Subject) -> list[str]:
    """Return notes on the assumed formats of quantised weights."""
    if scheme is None:
        return []
    if not weights.stored:
        return [f"weights are quantised ({scheme.method}), but the model has none of the weights that the config names"]
    parts = [f"{count / 1e9:.3g}e9 of {subject.parameters / 1e9:.3g}e9 parameters have {fmt}"
             for fmt, count in weights.stored]  # fmt: skip
    text = f"weights are quantised ({scheme.method}): {', '.join(parts)}; all others are in {subject.dtype}"
    copy = f"the plan includes a {subject.dtype} copy of the largest such matrix, {in_units(weights.copy)}"
    return [f"{text}; {copy}" if weights.copy else text]
