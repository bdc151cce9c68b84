"""How a model lives with weights on the host: what is saved is plain, and what is loaded is where it was.

    state_dict()                   plain tensors on the CPU that show the weights' bytes, as what saves them needs
    load_state_dict()              refused as a whole while another thread's program reads a weight
    load_state_dict(assign=True)   what took a weight's place is kept on the host too; tied weights are one again

Each module with such weights has a hook of its own, so this holds for parts of the model, copies and what is unpickled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mom_compile.runtime.host.weight import HostWeight, host_weight
from mom_compile.weights.nested import is_on_host, leaves, plain, replaced


def live_with(model: nn.Module, device: torch.device) -> None:
    """The hooks of a model some of whose parameters are on the host."""
    ties = _ties(model)
    for module in model.modules():
        own = {name for name, value in module._parameters.items() if value is not None and is_on_host(value)}
        if own:
            module.register_state_dict_post_hook(_PlainState())
            module.register_load_state_dict_post_hook(_HostedAgain(device, frozenset(own)))
    model.register_load_state_dict_pre_hook(_nobody_reads)
    if ties:
        model.register_load_state_dict_post_hook(_TiedAgain(ties))


def _ties(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Names of one parameter, where it has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return tuple(tuple(several) for several in names.values() if len(several) > 1)


@dataclass
class _PlainState:
    """Of a state dict asked for with `keep_vars`, parameters are left as they are."""

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name in module._parameters:
            value = state.get(prefix + name)
            if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter) and is_on_host(value):
                state[prefix + name] = plain(value)


@dataclass
class _HostedAgain:
    device: torch.device
    names: frozenset[str]

    def __call__(self, module: nn.Module, keys: Any) -> None:
        for name in self.names:
            value = module._parameters.get(name)
            if value is not None and value.device.type != "meta" and not is_on_host(value):
                module._parameters[name] = hosted(value, self.device)


@dataclass
class _TiedAgain:
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


def _nobody_reads(model: nn.Module, *_: Any) -> None:
    """Before anything is changed."""
    for parameter in model.parameters():
        for leaf in leaves(parameter):
            if isinstance(leaf, HostWeight):
                leaf.check_nobody_reads("load_state_dict()")


def hosted(parameter: torch.Tensor, device: torch.device, least: int = 0) -> nn.Parameter:
    """A parameter whose bytes stay on the host, but for tensors in it of fewer than `least` bytes."""

    def change(leaf: torch.Tensor) -> torch.Tensor:
        if leaf.numel() * leaf.element_size() < least:
            return leaf.detach().to(device)
        return host_weight(leaf.detach().cpu(), device)

    return like(replaced(parameter, change), parameter)


def like(tensor: torch.Tensor, parameter: torch.Tensor) -> nn.Parameter:
    """What else was noted at a parameter is noted at the new one."""
    made = nn.Parameter(tensor, requires_grad=False)
    if type(parameter) is nn.Parameter:
        for name, value in vars(parameter).items():
            setattr(made, name, value)
    return made
