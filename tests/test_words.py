"""The project is written in plain technical English: some turns of phrase do not occur."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("passes", "mom_compile", "docs", "benchmarks", "examples")
TEXTS = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md")]
TEXTS += [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]

#: A phrase, and what to write instead.
PHRASES = {
    r"\bwhoever\b": "name the caller, the reader or the thread",
    r"\bas they (really )?lie\b": "in their layout",
    r"\bsaid of\b": "name the fact",
    r"\btold\b": "reported, passed, distinguished",
    r"\bwhat is of\b": "name the thing",
    r"\bis no tensor\b": "expected a Tensor, got",
    r"\bthe house\b|\brooms\b": "architecture, packages",
    r"\bnone for us\b": "skipped",
    r"\bsomebody\b|\banybody\b|\bnobody\b": "name the reader or the caller",
    r"\berrands?\b": "task",
}


@pytest.mark.parametrize("phrase", PHRASES)
def test_a_riddle_is_not_written(phrase: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in TEXTS
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if re.search(phrase, line, re.IGNORECASE)
    ]
    assert not found, f"write instead: {PHRASES[phrase]}"


def test_texts_are_read() -> None:
    assert len(TEXTS) > 300
