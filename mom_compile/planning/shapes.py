"""Shapes of well-known models, shipped as data: a name stands for a config.json, without a download.

Terms
-----
shape   The fields of a published config.json that determine shapes and memory, with its address and the published
        number of parameters.
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
    """`source` is the public address of the config.json, `what` the part of it, `parameters` the published number of
    parameters, `config` the fields. `read_from` says where the values were read, if not at `source`."""

    name: str
    source: str
    what: str
    parameters: int
    config: Mapping[str, Any]
    read_from: str = ""


@functools.cache
def shapes() -> Mapping[str, Shape]:
    """Return all shapes by name; within a family, smaller ones first."""
    files = resources.files("mom_compile.planning") / "shapes"
    read = (json.loads(file.read_text("utf-8")) for file in files.iterdir() if file.name.endswith(".json"))
    found = [Shape(**fields) for fields in read]
    return {shape.name: shape for shape in sorted(found, key=lambda shape: (_plain(shape.name)[:4], shape.parameters))}


def find_shape(name: str) -> Shape | None:
    """Return the shape with this name, or None. Ignores case, separators and an owner (`"meta-llama/llama3_8b"`)."""
    wanted = _plain(name.rpartition("/")[2])
    return next((shape for shape in shapes().values() if _plain(shape.name) == wanted), None)


def nearest_shape(name: str) -> str | None:
    """Return the most similar name, or None."""
    plain = {_plain(known): known for known in shapes()}
    near = difflib.get_close_matches(_plain(name.rpartition("/")[2]), plain, n=1, cutoff=0.6)
    return plain[near[0]] if near else None


def _plain(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())
