"""What a stored program depends on beside what PyTorch's compile cache has in its keys: options, sources, rules, and
the devices, which decide how many rows its mini-sequences have. (PyTorch has the current device's name there, which
need not be the one that a graph is on.)"""

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
    """The part of the key that is ours; None where programs are not to be stored, since a rule of the user's own takes
    part, of which nothing tells whether it is the same in another process."""
    if foreign_rules():
        return None
    said = repr((options, platform.python_version(), _sources(), tuple(devices)))
    return f"mom_compile {hashlib.sha256(said.encode()).hexdigest()}"


def devices_of(example_inputs: Sequence[Any]) -> list[str]:
    """What is to be known of the GPUs that a graph's inputs are on; where there are none, how many threads compute."""
    found = {value.device for value in example_inputs if isinstance(value, torch.Tensor)}
    gpus = sorted((device for device in found if device.type == "cuda"), key=str)
    if not gpus:
        return [f"{torch.get_num_threads()} threads"]
    said = [torch.cuda.get_device_properties(device) for device in gpus]
    return [f"{one.name}, {one.major}.{one.minor}, {one.multi_processor_count}" for one in said]


@functools.cache
def _sources() -> str:
    """A digest of our own code: what an earlier version has stored is not read."""
    digest = hashlib.sha256()
    for package in (Path(__file__).parent, Path(mom_passes.__file__).parent):
        for path in sorted(package.rglob("*.py")):
            digest.update(str(path.relative_to(package)).encode() + b"\0")
            digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()
