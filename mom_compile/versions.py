"""Which versions of Python, PyTorch and transformers the results are tested with."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Mapping

import torch

#: First and last release that the tests run with; `constraints.txt` pins one set between them.
TESTED: dict[str, tuple[str, str]] = {
    "torch": ("2.11", "2.14"),
    "transformers": ("5.17", "5.24"),
    "Python": ("3.11", "3.13"),
}


def running() -> dict[str, str]:
    """The versions in use. A model need not be transformers': it counts only where it has been imported."""
    found = {"torch": str(torch.__version__), "Python": platform.python_version()}
    transformers = getattr(sys.modules.get("transformers"), "__version__", None)
    return found if transformers is None else {**found, "transformers": str(transformers)}


def untested(found: Mapping[str, str]) -> str | None:
    """Which of these versions are outside the tested range, in a sentence; None if none is."""
    outside = [f"{name} {version}" for name, version in found.items() if not is_tested(name, version)]
    if not outside:
        return None
    tested = ", ".join(f"{name} {first} to {last}" for name, (first, last) in TESTED.items())
    return f"mom_compile is tested with {tested}; results with {' and '.join(outside)} are unverified"


def is_tested(name: str, version: str) -> bool:
    first, last = TESTED[name]
    return _release(first) <= _release(version) <= _release(last)


def is_older(name: str, version: str) -> bool:
    """Than the first that is tested."""
    return _release(version) < _release(TESTED[name][0])


def _release(version: str) -> tuple[int, ...]:
    """Major and minor: `"2.14.1+cu130"` is `(2, 14)`. A version without numbers comes before all others."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])
