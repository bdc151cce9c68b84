"""The way of one value from capture to kernel, as `docs/architecture.md` tells it, is the one the code has."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from examples.follow import INTERMEDIATE, TOKENS, follow

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text()


def test_the_stations_of_the_activation() -> None:
    told: dict[str, list[str]] = {}

    def say(station: str, lines: Iterable[str]) -> None:
        told[station] = list(lines)

    follow(say)
    assert [name.split()[0] for name in told] == [str(number) for number in range(1, 10)]
    assert f": [1, {TOKENS}, {INTERMEDIATE}]" in told["1 capture"][1]
    assert all("mom.attention" in line for line in told["2 one attention"])
    assert "rows of dim 1" in told["3 token dimension"][0]
    assert told["3 token dimension"][1].count("all of it") == 2
    assert [line.partition("[")[2] for line in told["4 demands"]] == ["rows of dim 1]: rows"]
    assert f"float32[1, count, {INTERMEDIATE}]" in told["6 loop"][2]
    assert "stage_1: add" in told["7 in place"][0]
    assert any("loopstep stage_2" in line for line in told["8 program"])
    assert told["9 kernel"][1].startswith("compiled once, for all lengths")


def test_the_page_tells_the_same_stations() -> None:
    told = re.findall(r"^(\d)\. \*\*", PAGE, flags=re.M)
    assert told == [str(number) for number in range(1, 10)]


def test_the_page_names_rooms_and_files_that_are_there() -> None:
    named = re.findall(r"`([\w/]+\.py)`", PAGE)
    assert len(named) > 20
    places = (ROOT, ROOT / "mom_compile", ROOT / "passes" / "mom_passes")
    missing = [name for name in named if not any((place / name).exists() for place in places)]
    assert not missing
