"""Bytes as people read them."""

from __future__ import annotations

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def in_units(size: int) -> str:
    """With two or three digits of meaning: `in_units(1536)` is "1.5 KiB", `in_units(48 << 20)` "48 MiB"."""
    power = max(0, min((size.bit_length() - 1) // 10, len(_UNITS) - 1))
    number = size / (1 << 10 * power)
    if number >= 999.5 and power + 1 < len(_UNITS):
        power, number = power + 1, number / 1024
    return f"{number:.0f} {_UNITS[power]}" if power == 0 or number >= 10 else f"{number:.1f} {_UNITS[power]}"


def counted(count: int, what: str) -> str:
    """`counted(2, "loop")` is "2 loops"."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
