"""The scheme that a plan assumes for quantised weights, and the notes about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mom_compile.planning.configs import PlanError
from mom_compile.planning.quantised import Scheme, UnreadableError, scheme_of, scheme_of_bits
from mom_compile.planning.subject import Subject
from mom_compile.planning.weights import Weights
from mom_compile.report.units import in_units

#: `weight_bits` of weights that are not quantised.
UNQUANTISED = 16


def assumed_scheme(given: Mapping[str, Any] | None, bits: int | None) -> tuple[Scheme | None, list[str]]:
    """How weights are quantised, by a `quantization_config` or by bits that are planned in place of it, and notes on
    that. Raises `PlanError` for bits that weights do not come in."""
    method = "" if given is None else f" ({given.get('quant_method') or 'no method named'})"
    if bits is not None:
        note = f"the checkpoint is quantised{method}; the plan uses weight_bits={bits} instead"
        instead = [] if given is None else [note]
        try:
            return (None if bits == UNQUANTISED else scheme_of_bits(bits)), instead
        except ValueError as error:
            raise PlanError(f"{error}, or {UNQUANTISED} for weights that are not quantised") from error
    if given is None:
        return None, []
    try:
        return scheme_of(given), []
    except UnreadableError as error:
        return None, [
            f"the checkpoint is quantised{method}, but its bytes are unknown: {error}. The plan uses unquantised "
            f"weights; weight_bits=4 (--weight-bits 4) plans 4 bits"
        ]


def what_is_quantised(scheme: Scheme | None, weights: Weights, subject: Subject) -> list[str]:
    """Notes on the assumed formats of quantised weights."""
    if scheme is None:
        return []
    if not weights.stored:
        return [f"weights are quantised ({scheme.method}), but the model has none of the weights that the config names"]
    parts = [f"{count / 1e9:.3g}e9 of {subject.parameters / 1e9:.3g}e9 parameters have {fmt}"
             for fmt, count in weights.stored]  # fmt: skip
    text = f"weights are quantised ({scheme.method}): {', '.join(parts)}; all others are in {subject.dtype}"
    copy = f"a copy in {subject.dtype} of the largest such matrix, {in_units(weights.copy)}, is counted"
    return [f"{text}; {copy}" if weights.copy else text]
