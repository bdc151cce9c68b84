"""The tested versions of Python, PyTorch and transformers."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Mapping

import torch

#: The first and last tested release; `constraints.txt` pins one set in between.
TESTED: dict[str, tuple[str, str]] = {
    "torch": ("2.11", "2.14"),
    "transformers": ("5.17", "5.24"),
    "Python": ("3.11", "3.13"),
}


def running() -> dict[str, str]:
    """Return the versions in use. transformers is included only if it has been imported."""
    found = {"torch": str(torch.__version__), "Python": platform.python_version()}
    transformers = getattr(sys.modules.get("transformers"), "__version__", None)
    return found if transformers is None else {**found, "transformers": str(transformers)}


def untested(found: Mapping[str, str]) -> str | None:
    """Return a sentence about versions outside the tested range, or None."""
    outside = [f"{name} {version}" for name, version in found.items() if not is_tested(name, version)]
    if not outside:
        return None
    tested = ", ".join(f"{name} {first} to {last}" for name, (first, last) in TESTED.items())
    return f"mom_compile is tested with {tested}; results with {' and '.join(outside)} are unverified"


def is_tested(name: str, version: str) -> bool:
    first, last = TESTED[name]
    return _release(first) <= _release(version) <= _release(last)


def is_older(name: str, version: str) -> bool:
    """Whether a version is older than the first tested one."""
    return _release(version) < _release(TESTED[name][0])


def _release(version: str) -> tuple[int, ...]:
    """Return major and minor: `"2.14.1+cu130"` is `(2, 14)`. A version without numbers is `()`, the lowest."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])
