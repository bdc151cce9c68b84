"""Our part of the compile cache's keys: options, sources, rules, and the devices, on which the number of rows of
mini-sequences depends. (PyTorch's keys have the current device's name, but a graph may be on another.)"""

from __future__ import annotations

import functools
import hashlib
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import mom_passes
from mom_compile.config import Options
from mom_passes.rules.registry import foreign_rules


def cache_tag(options: Options, devices: Sequence[str] = ()) -> str | None:
    """Return our part of the key; None if programs must not be stored: it is unknown whether a user's own rule is the
    same in another process."""
    if foreign_rules():
        return None
    key = repr((options, platform.python_version(), _sources(), tuple(devices)))
    return f"mom_compile {hashlib.sha256(key.encode()).hexdigest()}"


def devices_of(example_inputs: Sequence[Any]) -> list[str]:
    """Describe the GPUs of a graph's inputs; without GPUs, return the number of threads."""
    found = {value.device for value in example_inputs if isinstance(value, torch.Tensor)}
    gpus = sorted((device for device in found if device.type == "cuda"), key=str)
    if not gpus:
        return [f"{torch.get_num_threads()} threads"]
    properties = [torch.cuda.get_device_properties(device) for device in gpus]
    return [f"{one.name}, {one.major}.{one.minor}, {one.multi_processor_count}" for one in properties]


@functools.cache
def _sources() -> str:
    """Return a digest of our code, so that stored results of other versions are not used."""
    digest = hashlib.sha256()
    for package in (Path(__file__).parent, Path(mom_passes.__file__).parent):
        for path in sorted(package.rglob("*.py")):
            digest.update(str(path.relative_to(package)).encode() + b"\0")
            digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()
