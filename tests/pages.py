"""Code blocks, console lines and inline commands of the documentation pages."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: `test_contributing.py` runs the Python of CONTRIBUTING.md.
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))


@dataclass(frozen=True)
class Block:
    """A fenced code block; `line` is the line of the opening fence."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """Return the code blocks of a page, in order."""
    text, found = page.read_text(), []
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(page.name, line, match[1], match[2]))
    return found


def console_lines(page: Path) -> list[Block]:
    """Return the console lines without comments, and inline `mom-compile` commands."""
    found = [
        Block(block.page, block.line + number, "console", line.split("   #")[0].strip())
        for block in blocks(page)
        if block.language == "console"
        for number, line in enumerate(block.text.splitlines(), 1)
        if line.strip()
    ]
    text = re.sub(r"^```.*?^```$", _blank, page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for match in re.finditer(r"`(mom-compile\s[^`]*)`", text):
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(page.name, line, "console", " ".join(match[1].split())))
    return found


def _blank(match: re.Match[str]) -> str:
    """Blank a match but keep its line breaks, so line numbers stay."""
    return re.sub(r"[^\n]", " ", match[0])
