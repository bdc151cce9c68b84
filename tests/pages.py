"""What pages for readers show: blocks of code, lines of a console, and commands in a sentence."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: CONTRIBUTING's Python has files that it belongs to: `test_contributing.py` runs it.
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


@dataclass(frozen=True)
class Block:
    """A block between fences, with the language behind the first; `line` is that of the fence."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """All of a page, in order."""
    text, found = page.read_text(), []
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(page.name, line, match[1], match[2]))
    return found


def console_lines(page: Path) -> list[Block]:
    """Lines of consoles without their comments, and commands of `mom-compile` within sentences."""
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
    """As many characters and lines, so that places stay what they are."""
    return re.sub(r"[^\n]", " ", match[0])
