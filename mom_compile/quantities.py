"""Parse amounts of bytes and tokens.

Terms
-----
number   Digits, with a point or with commas between groups of three: "80", "1.5", "131,072", "1_000_000".
unit     k, M, G, T are powers of 1000, Ki, Mi, Gi, Ti powers of 1024, in any case. Bytes may end with a B ("80 GiB",
         "80gb"; "80G" is 80 GB); tokens may not ("455k", "128Ki", "1M").
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from mom_compile.torch_compat.errors import UserError

_PREFIXES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
             "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30, "TI": 1 << 40}  # fmt: skip
_NUMBER = re.compile(r"([0-9]+(?:_[0-9]+)*|[0-9]{1,3}(?:,[0-9]{3})+)(\.[0-9]+)?\s*([A-Za-z]*)")

#: Fewer bytes of a device are a mistake: a number without its unit.
FEWEST_BYTES = 1 << 20
#: More than any machine has, so a typing error.
MOST_BYTES = 1 << 60
MOST_TOKENS = 1 << 40
#: Python refuses numbers of more than 4300 digits, with advice that does not apply here.
MOST_DIGITS = 100

BYTES_HELP = "it is a number of bytes above 0, or a string like '24GiB' (1024) or '24GB' (1000)"
TOKENS_HELP = "it is a whole number of tokens above 0, or a string like '131072', '455k' (1000), '128Ki' (1024) or '1M'"


def parse_bytes(value: Any, name: str = "memory_budget") -> int:
    """Parse bytes, as a number or a string such as "24GiB", rounded down to a whole number.

    Raises `ValueError` with the argument's `name` for anything else.
    """
    size = _amount(value, {p + end: factor for p, factor in _PREFIXES.items() for end in ("", "B")})
    if size is None or size < 1:
        raise UserError(f"{name}={value!r} is not valid; {BYTES_HELP}")
    if size > MOST_BYTES:
        raise UserError(f"{name}={value!r} is not valid: no machine has that much; {BYTES_HELP}")
    return int(size)


def unit_hint(value: Any) -> str:
    """Return a suggestion if the value is implausibly few bytes, else an empty string."""
    size = _amount(value, {"": 1})
    if size is None or not 0 < size < FEWEST_BYTES:
        return ""
    return f"; {value} is a number of bytes: did you mean '{value}GiB'?"


def parse_memory(value: Any, name: str) -> int:
    """Parse a device's memory with `parse_bytes`. Also raises `ValueError` for a small number without a unit."""
    size, hint = parse_bytes(value, name), unit_hint(value)
    if hint:
        raise UserError(f"{name}={value!r} is not valid{hint}")
    return size


def parse_tokens(value: Any, name: str = "seq_len") -> int:
    """Parse tokens, as a number or a string such as "455k". Raises `ValueError` with the argument's `name`."""
    count = _amount(value, _PREFIXES)
    if count is None or count <= 0:
        raise UserError(f"{name}={value!r} is not valid; {TOKENS_HELP}")
    if count.denominator != 1:
        raise UserError(f"{name}={value!r} is not valid: {float(count):g} is not a whole number; {TOKENS_HELP}")
    if count > MOST_TOKENS:
        raise UserError(f"{name}={value!r} is not valid: no model supports that many; {TOKENS_HELP}")
    return int(count)


def _amount(value: Any, units: dict[str, int]) -> Fraction | None:
    """Return the exact amount; None unless it is an integer or a string of a number and a unit."""
    if isinstance(value, int) and not isinstance(value, bool):
        return Fraction(value)
    found = _NUMBER.fullmatch(value.strip()) if isinstance(value, str) else None
    if found is None or found[3].upper() not in units:
        return None
    digits = re.sub("[,_]", "", found[1]) + (found[2] or "")
    return Fraction(digits) * units[found[3].upper()] if len(digits) <= MOST_DIGITS else Fraction(MOST_BYTES + 1)

