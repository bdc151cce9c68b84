"""A model's parameters grouped by layer, and which of them are worth storing on the host.

Terms
-----
unit    What is on the device at a time: a layer, or a parameter outside the layers (e.g. the head).
small   Norms, biases, routers: a parameter so small compared to its unit that copying it costs more than keeping it.
table   An embedding without other readers: only the rows looked up are copied to the device.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from torch import nn

from mom_compile.weights.nested import size_of

#: A parameter with fewer than 1 / SMALL_SHARE of its unit's bytes is small.
SMALL_SHARE = 64


@dataclass
class Unit:
    """`names` are the parameters that may stay on the host."""

    name: str
    names: list[str] = field(default_factory=list)
    bytes: int = 0
    table: bool = False


@dataclass(frozen=True)
class Parameters:
    """`units` in the model's order; `resident` parameters are always on the device."""

    units: tuple[Unit, ...]
    resident: tuple[str, ...]
    resident_bytes: int

    @property
    def layers(self) -> list[Unit]:
        return [unit for unit in self.units if not unit.table]


def parameters_of(model: nn.Module, keep: Collection[str]) -> Parameters:
    """Return every parameter once, by its first name. Raises `ValueError` if a name in `keep` is not in the model."""
    named = dict(model.named_parameters())
    _check_keep(model, keep)
    sizes = {name: size_of(parameter) for name, parameter in named.items()}
    units: dict[str, Unit] = {}
    totals: dict[str, int] = {}
    for name in named:
        totals[unit_of(name)] = totals.get(unit_of(name), 0) + sizes[name]
    tables = _tables(model)
    resident = []
    for name, parameter in named.items():
        unit = unit_of(name)
        small = parameter.dim() < 2 or sizes[name] * SMALL_SHARE < totals[unit]
        if small or any(_within(name, kept) for kept in keep):
            resident.append(name)
            continue
        found = units.setdefault(unit, Unit(unit, table=name in tables))
        found.names.append(name)
        found.bytes += sizes[name]
    return Parameters(tuple(units.values()), tuple(resident), sum(sizes[name] for name in resident))


def unit_of(name: str) -> str:
    """Return the layer of a parameter, up to the first number in its name; else the name itself."""
    found = re.match(r"(?:.*?\.)??\d+(?=\.)", name)
    return found[0] if found else name


def _tables(model: nn.Module) -> set[str]:
    """Return the names of weights that only embeddings have."""
    holders: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(module)
    return {
        name
        for name, parameter in model.named_parameters()
        if all(isinstance(module, nn.Embedding) for module in holders[id(parameter)])
    }


def _within(name: str, kept: str) -> bool:
    return name == kept or name.startswith(f"{kept}.")


def _check_keep(model: nn.Module, keep: Iterable[str]) -> None:
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)} | {
        name for name, _ in model.named_modules()
    }
    for kept in keep:
        if kept not in names:
            raise ValueError(f"keep contains {kept!r}, but the model has no such module or parameter")


def residents(units: list[Unit], room: int) -> list[Unit]:
    """Return as many units as fit into `room` bytes, spread evenly, so that copies overlap with resident ones."""
    count = len(units)
    for stay in range(count, 0, -1):
        chosen = [unit for i, unit in enumerate(units) if (i + 1) * stay // count > i * stay // count]
        if sum(unit.bytes for unit in chosen) <= room:
            return chosen
    return []
