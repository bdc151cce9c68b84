"""Bytes of a model's weights, quantised or not: of all, of those that are offloaded, and of those read per token.

Terms
-----
bank     The matrices of all experts in one parameter, `[experts, ...]`. A token reads those of its experts. The tokens
         of a decode step are assumed to choose different experts.
table    An embedding without other readers: a token reads one row of it, which is not counted.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

from mom_compile.planning.quantised import Format, Role, Scheme
from mom_compile.weights.units import parameters_of

#: Config fields for the number of experts per token.
_CHOSEN = (
    "num_experts_per_tok", "moe_topk", "top_k_experts", "moe_k", "num_experts_per_token", "num_selected_experts",
    "moe_top_k", "top_k_routers", "moe_num_active_primary_experts",
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """Bytes and parameters of weights that each decode step reads, and of banks, of which a token reads a `share`."""

    bytes: int
    count: int
    bank_bytes: int
    bank_count: int
    share: float

    def read(self, sequences: int) -> int:
        """Bytes that a decode step of `sequences` reads."""
        return self.bytes + int(self.bank_bytes * min(1.0, sequences * self.share))

    def work(self, sequences: int) -> int:
        """Multiply-adds of a decode step of `sequences`."""
        return sequences * (self.count + int(self.bank_count * self.share))


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's parameters and buffers: of `all`, and of those `resident` when weights are offloaded.

    `shapes` are those of offloaded parameters. `each` is what a decode step reads of all parameters, `leaving` what it
    reads of offloaded ones. `stored` has the number of parameters in each quantised format. `copy` is the size of a
    dequantised copy of the largest matrix that must be dequantised for a product.
    """

    all: int
    resident: int
    shapes: frozenset[tuple[int, ...]]
    each: Part
    leaving: Part
    stored: tuple[tuple[Format, int], ...] = ()
    copy: int = 0


def weights_of(model: nn.Module, config: Any, scheme: Scheme | None) -> Weights:
    """Return the weights of a model with unquantised parameters, in the formats of `scheme`."""
    named, roles = dict(model.named_parameters()), _roles(model)
    formats = {name: scheme.format_of(name, roles[name]) if scheme is not None else None for name in named}
    sizes = {name: _bytes(parameter, formats[name]) for name, parameter in named.items()}
    units = parameters_of(model, ()).units
    leaving = [name for unit in units for name in unit.names]
    read = named.keys() - {name for unit in units if unit.table for name in unit.names}
    share = _share(config, [named[name].shape[0] for name in named if roles[name] is Role.BANK])
    whole = sum(sizes.values()) + sum(buffer.nbytes for buffer in model.buffers())

    def part(names: set[str]) -> Part:
        banks = {name for name in names if roles[name] is Role.BANK}
        others = names - banks
        return Part(
            sum(sizes[name] for name in others), sum(named[name].numel() for name in others),
            sum(sizes[name] for name in banks), sum(named[name].numel() for name in banks), share,
        )  # fmt: skip

    stored: Counter[Format] = Counter()
    for name, fmt in formats.items():
        if fmt is not None:
            stored[fmt] += named[name].numel()
    copies = [named[name].nbytes for name, fmt in formats.items() if fmt is not None and fmt.dequantised]
    return Weights(
        whole,
        whole - sum(sizes[name] for name in leaving),
        frozenset(tuple(named[name].shape) for name in leaving),
        part(set(read)),
        part(set(read) & set(leaving)),
        tuple(stored.most_common()),
        max(copies, default=0),
    )


def _bytes(parameter: nn.Parameter, fmt: Format | None) -> int:
    return parameter.nbytes if fmt is None else fmt.bytes(parameter.shape)


def _roles(model: nn.Module) -> dict[str, Role]:
    """Return each parameter's role, by its first name. A head tied to an embedding is an embedding."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    roles: dict[str, Role] = {}
    known: set[int] = set()
    for owner, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in known:
                known.add(id(parameter))
                roles[f"{owner}.{own}" if owner else own] = _role(module, own, parameter, head)
    return roles


def _role(module: nn.Module, own: str, parameter: nn.Parameter, head: nn.Module | None) -> Role:
    if module is head:
        return Role.HEAD if parameter.dim() == 2 else Role.OTHER
    if isinstance(module, nn.Embedding):
        return Role.EMBEDDING
    if parameter.dim() == 3 and "expert" in type(module).__name__.lower():
        return Role.BANK
    linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    return Role.LINEAR if linear and own == "weight" else Role.OTHER


def _share(config: Any, experts: list[int]) -> float:
    """Return the share of a bank that a token reads; 1 if the config does not give the number of experts."""
    chosen = next((value for name in _CHOSEN if isinstance(value := getattr(config, name, None), int)), None)
    return 1.0 if chosen is None or not experts else min(1.0, chosen / max(experts))
