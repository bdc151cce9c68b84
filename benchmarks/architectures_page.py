from pathlib import Path
PAGE = Path(__file__).resolve().parent.parent / "docs" / "architectures.md"
def page(r): return "wip\n"
