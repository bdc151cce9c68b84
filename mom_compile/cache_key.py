"""What a stored program depends on beside what PyTorch's compile cache has in its keys: options, sources, rules."""

from __future__ import annotations

import functools
import hashlib
import platform
from pathlib import Path

import mom_passes
from mom_compile.config import Options
from mom_passes.rules.registry import foreign_rules


def cache_tag(options: Options) -> str | None:
    """The part of the key that is ours; None where programs are not to be stored, since a rule of the user's own takes
    part, of which nothing tells whether it is the same in another process."""
    if foreign_rules():
        return None
    said = repr((options, platform.python_version(), _sources()))
    return f"mom_compile {hashlib.sha256(said.encode()).hexdigest()}"


@functools.cache
def _sources() -> str:
    """A digest of our own code: what an earlier version has stored is not read."""
    digest = hashlib.sha256()
    for package in (Path(__file__).parent, Path(mom_passes.__file__).parent):
        for path in sorted(package.rglob("*.py")):
            digest.update(str(path.relative_to(package)).encode() + b"\0")
            digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()
