"""Hooks of models with weights on the host: state dicts are saved as plain tensors and loaded to the host again.

    state_dict()                   plain tensors on the CPU that share the weights' bytes, so that they can be saved
    load_state_dict()              refused as a whole while another thread's program reads a weight
    load_state_dict(assign=True)   assigned tensors become weights on the host too; tied weights stay tied

Each module with such weights has its own hooks, so this also applies to parts, copies and unpickled models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mom_compile.runtime.host.weight import HostWeight, host_weight
from mom_compile.weights.nested import is_on_host, leaves, plain, replaced


def add_state_hooks(model: nn.Module, device: torch.device) -> None:
    """Register the hooks of a model with parameters on the host."""
    ties = _ties(model)
    for module in model.modules():
        own = {name for name, value in module._parameters.items() if value is not None and is_on_host(value)}
        if own:
            module.register_state_dict_post_hook(_PlainState())
            module.register_load_state_dict_post_hook(_MoveToHost(device, frozenset(own)))
    model.register_load_state_dict_pre_hook(_check_not_read)
    if ties:
        model.register_load_state_dict_post_hook(_TieAgain(ties))


def _ties(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Return the names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return tuple(tuple(several) for several in names.values() if len(several) > 1)


@dataclass
class _PlainState:
    """Replace host weights by plain tensors. With `keep_vars` the state dict has parameters, which are left alone."""

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name in module._parameters:
            value = state.get(prefix + name)
            if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter) and is_on_host(value):
                state[prefix + name] = plain(value)


@dataclass
class _MoveToHost:
    device: torch.device
    names: frozenset[str]

    def __call__(self, module: nn.Module, keys: Any) -> None:
        for name in self.names:
            value = module._parameters.get(name)
            if value is not None and value.device.type != "meta" and not is_on_host(value):
                module._parameters[name] = hosted(value, self.device)


@dataclass
class _TieAgain:
    ties: tuple[tuple[str, ...], ...]

    def __call__(self, model: nn.Module, keys: Any) -> None:
        found = dict(model.named_parameters(remove_duplicate=False))
        for first, *others in self.ties:
            for name in others:
                if first in found and name in found and _same_bytes(found[first], found[name]):
                    path, _, own = name.rpartition(".")
                    model.get_submodule(path)._parameters[own] = found[first]  # type: ignore[assignment]


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return all(
        isinstance(a, HostWeight) and isinstance(b, HostWeight) and a.host.is_set_to(b.host)
        for a, b in zip(leaves(one), leaves(other), strict=False)
    )


def _check_not_read(model: nn.Module, *_: Any) -> None:
    """Raise before anything is changed if a program of another thread reads a weight."""
    for parameter in model.parameters():
        for leaf in leaves(parameter):
            if isinstance(leaf, HostWeight):
                leaf.check_not_read("load_state_dict()")


def hosted(parameter: torch.Tensor, device: torch.device, least: int = 0) -> nn.Parameter:
    """Return a parameter whose bytes stay on the host, except for inner tensors of fewer than `least` bytes."""

    def change(leaf: torch.Tensor) -> torch.Tensor:
        if leaf.numel() * leaf.element_size() < least:
            return leaf.detach().to(device)
        return host_weight(leaf.detach().cpu(), device)

    return like(replaced(parameter, change), parameter)


def like(tensor: torch.Tensor, parameter: torch.Tensor) -> nn.Parameter:
    """Return `tensor` as a parameter with the attributes of `parameter`."""
    made = nn.Parameter(tensor, requires_grad=False)
    if type(parameter) is nn.Parameter:
        for name, value in vars(parameter).items():
            setattr(made, name, value)
    return made
