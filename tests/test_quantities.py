"""Amounts are parsed as people write them; invalid ones raise with the accepted forms."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mom_compile.quantities import MOST_BYTES, MOST_TOKENS, parse_bytes, parse_memory, parse_tokens, unit_hint
from mom_compile.report.units import in_units


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GiB", 24 << 30), ("1.5 MiB", 3 << 19), ("7 kb", 7000), ("12", 12), (5, 5), ("80gb", 80 * 10**9),
     ("80 GiB", 80 << 30), ("80G", 80 * 10**9), ("80Gi", 80 << 30), (" 0.1 TB ", 10**11), ("131,072", 131072),
     ("1_000_000 B", 10**6), ("0.1 KiB", 102)],
)  # fmt: skip
def test_bytes_are_parsed_from_numbers_and_strings(text, size):
    assert parse_bytes(text) == size


NONSENSE = ["", "GiB", "-3GiB", "3 XiB", "1e9", 0, -1, True, 2.5, None, [1], "0", "0 GiB", "nan", float("nan"),
            "inf", float("inf"), "1e400", "80 GiB 3", "1,5 GiB", "12,34", "8__0", "0x10", "٣", "1.",
            ".5GiB", "80 80"]  # fmt: skip


@pytest.mark.parametrize("bad", [*NONSENSE, "0.5", "9" * 5000, "99999999 TiB"])
def test_invalid_amounts_of_bytes_raise(bad):
    with pytest.raises(ValueError, match=r"memory_budget=.*24GiB"):
        parse_bytes(bad)


@pytest.mark.parametrize(("given", "meant"), [("24", "24GiB"), ("80", "80GiB"), ("1_000", "1_000GiB"), (24, "24GiB")])
def test_a_small_number_without_a_unit_raises(given, meant):
    with pytest.raises(ValueError, match=rf"^--device-memory={given!r} is not valid; .*did you mean '{meant}'\?"):
        parse_memory(given, "--device-memory")
    assert meant in unit_hint(given)


@pytest.mark.parametrize("given", ["24GiB", "512 KiB", 1 << 20, "1048576", 25769803776])
def test_amounts_with_a_unit_or_large_numbers_are_accepted(given):
    assert parse_memory(given, "--device-memory") == parse_bytes(given) and unit_hint(given) == ""


def test_errors_name_the_option():
    with pytest.raises(ValueError, match=r"^--device-memory='80 elephants' is not valid; .*'24GB' \(1000\)"):
        parse_bytes("80 elephants", "--device-memory")
    with pytest.raises(ValueError, match=r"^--seq-len='many' is not valid; .*'455k' \(1000\), '128Ki' \(1024\)"):
        parse_tokens("many", "--seq-len")


@pytest.mark.parametrize(
    ("text", "count"),
    [("455k", 455_000), ("1M", 10**6), ("131072", 131072), ("128Ki", 1 << 17), ("128 ki", 1 << 17), ("1.5k", 1500),
     ("131,072", 131072), ("1_000_000", 10**6), ("1m", 10**6), ("0.5Mi", 1 << 19), (7, 7)],
)  # fmt: skip
def test_tokens_are_parsed_from_numbers_and_strings(text, count):
    assert parse_tokens(text) == count


@pytest.mark.parametrize("bad", [*(value for value in NONSENSE), "80GiB", "5 kb", "9" * 5000])
def test_invalid_numbers_of_tokens_raise(bad):
    with pytest.raises(ValueError, match=r"seq_len=.*is not valid.*'455k'"):
        parse_tokens(bad)


@pytest.mark.parametrize(
    ("text", "why"),
    [("1.5", "1.5 is not a whole number"), ("0.0001k", "0.1 is not a whole"), ("9999T", "no model supports that many")],
)
def test_errors_explain_invalid_numbers_of_tokens(text, why):
    with pytest.raises(ValueError, match=why):
        parse_tokens(text)


@given(st.integers(1, MOST_BYTES))
def test_printed_bytes_can_be_parsed(size):
    assert parse_bytes(size) == parse_bytes(str(size)) == parse_bytes(f"{size:,}") == size
    # Two digits at least: 1.0 KiB stands for up to 1.05.
    assert abs(parse_bytes(in_units(size)) - size) <= 0.05 * size + 1


@given(st.integers(1, MOST_TOKENS))
def test_printed_tokens_can_be_parsed(count):
    assert parse_tokens(count) == parse_tokens(str(count)) == parse_tokens(f"{count:,}") == count


@given(st.integers(1, 1000), st.sampled_from(["", "K", "M", "G"]))
def test_a_unit_is_a_factor(count, unit):
    assert parse_tokens(f"{count}{unit}i" if unit else str(count)) == count << 10 * ["", "K", "M", "G"].index(unit)
    assert parse_bytes(f"{count} {unit}B") == count * 1000 ** ["", "K", "M", "G"].index(unit)


@given(st.text(max_size=12))
def test_no_string_raises_another_error(text):
    for parse in (parse_bytes, parse_tokens):
        message = None
        try:
            assert parse(text) > 0
        except ValueError as error:
            message = str(error)
        assert message is None or repr(text) in message
