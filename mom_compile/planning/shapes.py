"""Well-known shapes, shipped as data: a name stands for a config.json that need not be downloaded.

Terms
-----
shape   The fields of a published config.json that shapes and memory follow from, with the address they are from and the
        published number of parameters.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any


@dataclass(frozen=True)
class Shape:
    """`source` is the public address of the config.json, `what` says which part of it this is, `parameters` is the
    published number of parameters, `config` the fields."""

    name: str
    source: str
    what: str
    parameters: int
    config: Mapping[str, Any]


@functools.cache
def shapes() -> Mapping[str, Shape]:
    """All of them by name, the smaller of a family first."""
    files = resources.files("mom_compile.planning") / "shapes"
    read = (json.loads(file.read_text("utf-8")) for file in files.iterdir() if file.name.endswith(".json"))
    found = [Shape(**fields) for fields in read]
    return {shape.name: shape for shape in sorted(found, key=lambda shape: (_plain(shape.name)[:4], shape.parameters))}


def find_shape(name: str) -> Shape | None:
    """By its name, in any case, with or without what stands between letters and digits and an owner before it
    (`"meta-llama/llama3_8b"`); None where there is none of that name."""
    wanted = _plain(name.rpartition("/")[2])
    return next((shape for shape in shapes().values() if _plain(shape.name) == wanted), None)


def nearest_shape(name: str) -> str | None:
    """The name that somebody may have meant."""
    plain = {_plain(known): known for known in shapes()}
    near = difflib.get_close_matches(_plain(name.rpartition("/")[2]), plain, n=1, cutoff=0.6)
    return plain[near[0]] if near else None


def _plain(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())
