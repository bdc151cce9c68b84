"""`offload_weights`: of a model's weights, what does not fit into a budget stays on the host.

    budget  >=  buffers, norms, what is kept  +  two units under way  +  units that stay

A unit is a layer, or what is outside the layers. Each that does not stay is read once per prefill and per decode step.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mom_compile.config import parse_bytes
from mom_compile.memory.policy import available_bytes
from mom_compile.notices import warn_once
from mom_compile.report.units import in_units
from mom_compile.runtime.host.engine_cuda import pin_for
from mom_compile.runtime.host.limits import HostMemoryError
from mom_compile.runtime.host.weight import HostWeight, host_weight
from mom_compile.runtime.host.weight_bytes import bytes_under, pin_where_they_lie
from mom_compile.weights.checkpoint import Checkpoint
from mom_compile.weights.units import Parameters, Unit, parameters_of, residents

#: Of what a device has free, the share that `memory_budget=None` leaves to the cache and to what is computed.
SHARE_OF_THE_REST = 4


@dataclass(frozen=True)
class OffloadedWeights:
    """What was done, in bytes: `on_host` is read once per prefill and per decode step, but for `tables`, of which only
    rows are; `mapped` is how much of both is in files. `under_way` is what two units take on the device at most."""

    device: torch.device
    resident: int
    under_way: int
    on_host: int
    tables: int
    mapped: int
    units: tuple[str, ...] = field(repr=False)

    def __str__(self) -> str:
        return (
            f"{in_units(self.resident)} of weights on {self.device}, at most {in_units(self.under_way)} under way; "
            f"{in_units(self.on_host)} on the host are read once per prefill and per token"
            + (f", of {in_units(self.tables)} of embeddings only rows" if self.tables else "")
            + (f"; {in_units(self.mapped)} are mapped from files" if self.mapped else "")
        )


#: The models that have been offloaded, as long as they live.
_OFFLOADED: weakref.WeakKeyDictionary[nn.Module, OffloadedWeights] = weakref.WeakKeyDictionary()


def offload_weights(
    model: nn.Module,
    device: torch.device | str,
    *,
    memory_budget: int | str | None = None,
    directory: str | Path | None = None,
    keep: Collection[str] = (),
) -> OffloadedWeights:
    """Keep on the host, in place, what does not fit into `memory_budget` bytes of `device`.

    model          its parameters are on the CPU, or on the meta device where `directory` has them
    device         where it will compute: "cuda", or "cpu" to try it between two kinds of host memory
    memory_budget  bytes of the device for weights, two layers under way included, as a number or as "8GiB"; None: what
                   is free, less a quarter for the cache and what is computed (a CPU needs a number)
    directory      a folder of safetensors files: weights found there by name are mapped from the files, not held in
                   memory
    keep           names of modules or parameters that go to the device in any case

    Then `model.compile(backend="mom")` as ever: each weight arrives one layer ahead of its use. Parameters no longer
    ask for gradients. Raises `ValueError` for a model, a device, a folder or a budget that this cannot be done with,
    and then the model is as it was.
    """
    target = _checked_device(device)
    if isinstance(keep, str):
        raise ValueError(f"keep={keep!r} is not valid; it is a list of names of modules or parameters")
    found = parameters_of(model, keep)
    files = Checkpoint.open(Path(directory)) if directory is not None else None
    _check_places(model, files)
    budget = _budget(memory_budget, target)
    stay, leave = split(found, _buffer_bytes(model), budget)
    tensors = _tensors(model, files)
    under_way = 2 * max((unit.bytes for unit in leave if not unit.table), default=0)
    on_host = [name for unit in leave for name in unit.names]
    _pin([tensors[name] for name in on_host], target)
    _place(model, tensors, set(on_host), target)
    mapped = sum(tensors[name].nbytes for name in on_host if bytes_under(tensors[name]).in_file)
    made = OffloadedWeights(
        target,
        found.resident_bytes + _buffer_bytes(model) + sum(unit.bytes for unit in stay),
        under_way,
        sum(unit.bytes for unit in leave if not unit.table),
        sum(unit.bytes for unit in leave if unit.table),
        mapped,
        tuple(unit.name for unit in leave),
    )
    _OFFLOADED[model] = made
    if on_host:
        _live_with(model)
    return made


def split(found: Parameters, buffers: int, budget: int) -> tuple[list[Unit], list[Unit]]:
    """Units that stay on the device and those that do not. Raises `ValueError` where two layers do not fit."""
    every = found.resident_bytes + buffers + sum(unit.bytes for unit in found.units)
    if every <= budget:
        return list(found.units), []
    layers = found.layers
    room = budget - found.resident_bytes - buffers
    largest = max((unit.bytes for unit in layers), default=0)
    least = found.resident_bytes + buffers + 2 * largest
    if budget < least:
        raise ValueError(
            f"memory_budget={budget} bytes ({in_units(budget)}) cannot hold two layers of this model and what has to "
            f"be on the device beside them: the smallest budget is {least} bytes ({in_units(least)})"
        )
    stay = residents(layers, room - 2 * largest)
    names = {unit.name for unit in stay}
    return stay, [unit for unit in found.units if unit.name not in names]


# --------------------------------------------------------------------------------------------------- what is given


def _checked_device(device: torch.device | str) -> torch.device:
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r} is not valid: {str(error).splitlines()[0]}") from None
    if target.type not in ("cpu", "cuda"):
        raise ValueError(f"device={device!r}: weights can be kept on the host for a CUDA device, or for 'cpu'")
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={device!r} does not exist here: {torch.cuda.device_count()} CUDA devices do")
    return torch.device("cuda", torch.cuda.current_device()) if str(target) == "cuda" else target


def _check_places(model: nn.Module, files: Checkpoint | None) -> None:
    for name, parameter in model.named_parameters():
        if isinstance(parameter, HostWeight):
            raise ValueError(f"{name} is kept on the host already: offload_weights was called on this model before")
        found = files.get(name) if files is not None else None
        if found is not None and (found.shape != parameter.shape or found.dtype != parameter.dtype):
            raise ValueError(
                f"{name} is {parameter.dtype} {list(parameter.shape)} in the model, and {found.dtype} "
                f"{list(found.shape)} in the files of `directory`"
            )
        if parameter.device.type == "meta" and found is None:
            raise ValueError(f"{name} is on the meta device, and no file of `directory` has it")
        if parameter.device.type not in ("cpu", "meta"):
            raise ValueError(f"{name} is on {parameter.device}: load the model on the CPU, then call offload_weights")
    for name, buffer in model.named_buffers():
        if buffer.device.type == "meta":
            raise ValueError(f"the buffer {name} is on the meta device: make the model on the CPU, its weights alone "
                             "on the meta device; or use load_offloaded")  # fmt: skip


def _budget(memory_budget: int | str | None, device: torch.device) -> int:
    if memory_budget is not None:
        return parse_bytes(memory_budget)
    if device.type == "cpu":
        raise ValueError("memory_budget has to be a number of bytes for device='cpu', whose memory is the host's")
    free = available_bytes(device, 0)
    return free - free // SHARE_OF_THE_REST


def _buffer_bytes(model: nn.Module) -> int:
    return sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())


def _tensors(model: nn.Module, files: Checkpoint | None) -> dict[str, torch.Tensor]:
    """Each parameter's bytes on the host: in its file, or where it is."""
    found = {}
    for name, parameter in model.named_parameters():
        mapped = files.get(name) if files is not None else None
        found[name] = parameter.detach() if mapped is None else mapped
    return found


# ------------------------------------------------------------------------------------------------- where they go


def _pin(tensors: list[torch.Tensor], device: torch.device) -> None:
    if device.type != "cuda" or not tensors:
        return
    try:
        pin_where_they_lie(tensors, pin_for(device))
    except HostMemoryError as error:
        warn_once(
            "weights are not pinned",
            f"weights on the host cannot be pinned, so their copies go through the driver's own buffers and do not run "
            f"beside the computation: {error}",
        )


def _place(model: nn.Module, tensors: dict[str, torch.Tensor], on_host: set[str], device: torch.device) -> None:
    """Parameters become what they will be; those that several modules have stay one."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for own, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                name = first[id(parameter)]
                made[id(parameter)] = _placed(parameter, tensors[name], name in on_host, device)
            module._parameters[own] = made[id(parameter)]
        for own, buffer in module._buffers.items():
            if buffer is not None and buffer.device != device:
                module._buffers[own] = buffer.to(device)


def _placed(parameter: nn.Parameter, tensor: torch.Tensor, stays: bool, device: torch.device) -> nn.Parameter:
    if stays:
        return _parameter(host_weight(tensor, device), parameter)
    moved = tensor.to(device)
    if bytes_under(tensor).in_file and device.type == "cpu":
        moved = tensor.clone()
    if parameter.device.type != "meta":
        parameter.requires_grad_(False)
        parameter.data = moved
        return parameter
    return _parameter(moved, parameter)


def _parameter(tensor: torch.Tensor, like: nn.Parameter) -> nn.Parameter:
    """What else was noted at a parameter is noted at the new one."""
    made = nn.Parameter(tensor, requires_grad=False)
    for name, value in vars(like).items():
        if name not in ("host", "lease"):
            with contextlib.suppress(AttributeError):
                setattr(made, name, value)
    return made


# ---------------------------------------------------------------------------------------------- living with them


def _live_with(model: nn.Module) -> None:
    """`state_dict` has plain tensors, which show the weights where they lie: what saves them needs their bytes."""
    model.register_state_dict_post_hook(_plain_state)
    model.register_load_state_dict_post_hook(_hosted_again)


def _plain_state(model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name, value in state.items():
        if isinstance(value, HostWeight):
            state[name] = value.settled()


def _hosted_again(model: nn.Module, keys: Any) -> None:
    """After `load_state_dict(assign=True)`: what took a weight's place is kept where that was."""
    made = _OFFLOADED.get(model)
    if made is None:
        return
    for module, own, parameter, name in _named(model):
        was_there = name.startswith(made.units) and parameter.dim() >= 2 and made.device.type != "cpu"
        if was_there and type(parameter) is nn.Parameter and parameter.device.type == "cpu":
            module._parameters[own] = _parameter(host_weight(parameter.detach(), made.device), parameter)


def _named(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter, str]]:
    for prefix, module in model.named_modules():
        for own, parameter in module._parameters.items():
            if parameter is not None:
                yield module, own, parameter, f"{prefix}.{own}" if prefix else own
