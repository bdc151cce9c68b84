"""`offload_weights`: store on the host the weights of a model that do not fit into a budget.

    budget  >=  buffers, norms, parameters in `keep`  +  two units in transfer  +  units that stay on the device

A unit is a layer, or a parameter outside the layers. Every other unit is read once per prefill and per decode step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from mom_compile.divided import check_heads, is_fully_sharded
from mom_compile.memory.device import available_bytes
from mom_compile.notices import warn_once
from mom_compile.quantities import parse_bytes
from mom_compile.report.units import in_units
from mom_compile.runtime.host.engine_cuda import pin_for
from mom_compile.runtime.host.limits import HostMemoryError
from mom_compile.runtime.host.weight_bytes import bytes_under, pin_in_place
from mom_compile.torch_compat.distributed import is_sharded
from mom_compile.weights.checkpoint import Checkpoint
from mom_compile.weights.nested import (
    LEAST_INNER_BYTES,
    fault_of,
    is_nested,
    is_on_host,
    leaves,
    replaced,
    size_of,
)
from mom_compile.weights.state_hooks import add_state_hooks, hosted, like
from mom_compile.weights.units import Parameters, Unit, parameters_of, residents

#: `memory_budget=None` leaves 1 / SHARE_OF_THE_REST of a device's free memory to the cache and activations.
SHARE_OF_THE_REST = 4


@dataclass(frozen=True)
class OffloadedWeights:
    """What `offload_weights` did. Sizes are in bytes.

    Attributes
    ----------
    device : torch.device
        The device on which the model computes.
    resident : int
        Weights and buffers that are on the device.
    under_way : int
        The most that two layers in transfer take on the device.
    on_host : int
        Weights on the host without `tables`. A prefill and a decode step read each of them at most once.
    tables : int
        Embeddings on the host, of which only the rows that are looked up are copied.
    mapped : int
        The part of `on_host` and `tables` that is in files.
    units : tuple of str
        Names of the layers and modules that are on the host.
    """

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
            f"{in_units(self.on_host)} on the host are read at most once per prefill and per token"
            + (f", of {in_units(self.tables)} of embeddings only rows" if self.tables else "")
            + (f"; {in_units(self.mapped)} are mapped from files" if self.mapped else "")
        )

    def __repr__(self) -> str:
        return f"<OffloadedWeights: {self}>"


#: Results of the living models.
_OFFLOADED: weakref.WeakKeyDictionary[nn.Module, OffloadedWeights] = weakref.WeakKeyDictionary()


def offload_weights(
    model: nn.Module,
    device: torch.device | str,
    *,
    memory_budget: int | str | None = None,
    directory: str | Path | None = None,
    keep: Collection[str] = (),
) -> OffloadedWeights:
    """Move a model to `device` in place, and keep on the host the weights that do not fit into `memory_budget`.

    Compile the model afterwards: compiled programs copy each weight one layer ahead of its use. Parameters no longer
    require gradients.

    Parameters
    ----------
    model : torch.nn.Module
        A model with its parameters on the CPU, or on the meta device where `directory` has them. Those of a
        tensor-parallel model may be on `device`; each rank offloads its own part.
    device : torch.device or str
        Where the model computes: `"cuda"`, or `"cpu"` to try it between two kinds of host memory.
    memory_budget : int or str, optional
        Bytes of the device for weights, two layers in transfer included: a number or a text such as `"8GiB"`. `None`
        takes three quarters of what is free and leaves a quarter for the cache and for activations. A CPU needs a
        number.
    directory : str or Path, optional
        A folder of safetensors files. Weights that it has by name are mapped from the files and not held in memory.
    keep : collection of str
        Names of modules or parameters that always go to the device.

    Returns
    -------
    OffloadedWeights
        Sizes in bytes, and the names of what is on the host.

    Raises
    ------
    ValueError
        If the model, the device, the folder or the budget does not allow it. The model is then unchanged.
    """
    target = _checked_device(device)
    if isinstance(keep, str):
        raise ValueError(f"keep={keep!r} is not valid; it is a list of names of modules or parameters")
    files = Checkpoint.open(Path(directory)) if directory is not None else None
    check_heads(model)
    _check_places(model, files, target)
    found = parameters_of(model, keep)
    budget = _budget(memory_budget, target, model)
    stay, leave = split(found, _buffer_bytes(model), budget)
    tensors = _tensors(model, files)
    under_way = 2 * max((unit.bytes for unit in leave if not unit.table), default=0)
    on_host = [name for unit in leave for name in unit.names]
    _check_kinds(model, on_host)
    on_device = [name for name in on_host if tensors[name].device.type != "cpu"]
    tensors |= {name: replaced(tensors[name], torch.Tensor.cpu) for name in on_device}
    parts = [leaf for name in on_host for leaf in leaves(tensors[name])]
    place = _placing(model, tensors, set(on_host), target)
    _pin(parts, target)
    place()
    mapped = sum(part.nbytes for part in parts if bytes_under(part).in_file)
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
        add_state_hooks(model, target)
    return made


def least_budget(model: nn.Module, keep: Collection[str] = ()) -> int:
    """Return the smallest valid `memory_budget` of `offload_weights` for a model, in bytes."""
    return _least(parameters_of(model, keep), _buffer_bytes(model))


def _least(found: Parameters, buffers: int) -> int:
    """Two layers, and everything that is always on the device."""
    return found.resident_bytes + buffers + 2 * max((unit.bytes for unit in found.layers), default=0)


def split(found: Parameters, buffers: int, budget: int) -> tuple[list[Unit], list[Unit]]:
    """Return the units that stay on the device, and the others. Raises `ValueError` if two layers do not fit."""
    every = found.resident_bytes + buffers + sum(unit.bytes for unit in found.units)
    if every <= budget:
        return list(found.units), []
    least = _least(found, buffers)
    if budget < least:
        raise ValueError(
            f"memory_budget={budget} bytes ({in_units(budget)}) cannot hold two layers of this model in addition to "
            f"what is always on the device: the smallest budget is {least} bytes ({in_units(least)})"
        )
    stay = residents(found.layers, budget - least)
    names = {unit.name for unit in stay}
    return stay, [unit for unit in found.units if unit.name not in names]


# ------------------------------------------------------------------------------------------------------- arguments


def _checked_device(device: torch.device | str) -> torch.device:
    try:
        target = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device!r} is not valid: {str(error).splitlines()[0]}") from None
    if target.type not in ("cpu", "cuda"):
        raise ValueError(f"device={device!r}: weights can be offloaded for a CUDA device, or for 'cpu'")
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={device!r} does not exist: this machine has {torch.cuda.device_count()} CUDA devices")
    return torch.device("cuda", torch.cuda.current_device()) if str(target) == "cuda" else target


def _check_places(model: nn.Module, files: Checkpoint | None, target: torch.device) -> None:
    sharded = next((name for name, module in model.named_modules() if is_fully_sharded(module)), None)
    if sharded is not None:
        raise ValueError(
            f"{sharded or 'the model'} is sharded by FSDP, which gathers weights itself: give fully_shard an "
            "offload_policy=CPUOffloadPolicy(), or divide the model by tensor parallelism instead"
        )
    places = {"cpu", "meta"}
    if any(map(is_sharded, model.parameters())):
        places.add(target.type)  # transformers loads the parts of weights to the device of each rank
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(f"{name} has no size yet: call the model once before its weights are offloaded")
        if is_on_host(parameter):
            raise ValueError(f"{name} is already stored on the host: offload_weights was called on this model before")
        found = _in_files(files, name, parameter)
        if found is not None and (found.shape != parameter.shape or found.dtype != parameter.dtype):
            raise ValueError(
                f"{name} is {parameter.dtype} {list(parameter.shape)} in the model, and {found.dtype} "
                f"{list(found.shape)} in the files of `directory`"
            )
        if parameter.device.type == "meta" and found is None:
            raise ValueError(f"{name} is on the meta device, but not in any file of `directory`")
        if parameter.device.type not in places:
            raise ValueError(f"{name} is on {parameter.device}: load the model on the CPU, then call offload_weights")
    for name, buffer in model.named_buffers():
        if buffer.device.type == "meta":
            raise ValueError(f"the buffer {name} is on the meta device: create the model on the CPU, with only its "
                             "weights on the meta device; or use load_offloaded")  # fmt: skip


def _budget(memory_budget: int | str | None, device: torch.device, model: nn.Module) -> int:
    if memory_budget is not None:
        return parse_bytes(memory_budget)
    if device.type == "cpu":
        raise ValueError("memory_budget must be a number of bytes for device='cpu', which has only host memory")
    free = available_bytes(device, 0) + sum(size_of(p) for p in model.parameters() if p.device == device)
    return free - free // SHARE_OF_THE_REST


def _buffer_bytes(model: nn.Module) -> int:
    return sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())


def _in_files(files: Checkpoint | None, name: str, parameter: nn.Parameter) -> torch.Tensor | None:
    """Return a parameter's bytes in its file. The file stores a quantised one in another form under its name."""
    return None if files is None or is_nested(parameter) else files.get(name)


def _tensors(model: nn.Module, files: Checkpoint | None) -> dict[str, torch.Tensor]:
    """Return each parameter's bytes on the host: in its file if it has one."""
    found = {}
    for name, parameter in model.named_parameters():
        mapped = _in_files(files, name, parameter)
        found[name] = parameter.detach() if mapped is None else mapped
    return found


def _check_kinds(model: nn.Module, names: Collection[str]) -> None:
    found = dict(model.named_parameters())
    for name in names:
        fault = fault_of(found[name])
        if fault is not None:
            raise ValueError(f"{name} cannot be stored on the host: it {fault}")


# ------------------------------------------------------------------------------------------------------- placement


def _pin(tensors: list[torch.Tensor], device: torch.device) -> None:
    if device.type != "cuda" or not tensors:
        return
    try:
        pin_in_place(tensors, pin_for(device))
    except HostMemoryError as error:
        warn_once(
            "weights are not pinned",
            f"weights on the host cannot be pinned, so their copies go through the driver's own buffers and do not "
            f"overlap with the computation: {error}",
        )


@dataclass(frozen=True)
class _Placed:
    """The replacement of a parameter: another one, or itself with other bytes."""

    parameter: nn.Parameter
    data: torch.Tensor | None = None

    def put(self) -> nn.Parameter:
        self.parameter.requires_grad_(False)
        if self.data is not None:
            self.parameter.data = self.data
        return self.parameter


def _placing(
    model: nn.Module, tensors: dict[str, torch.Tensor], on_host: set[str], device: torch.device
) -> Callable[[], None]:
    """Prepare the new parameters and buffers, and return a function that installs them. Only preparing may fail.

    A parameter that several modules share stays shared.
    """
    made = {
        id(parameter): _placed(parameter, tensors[name], name in on_host, device)
        for name, parameter in model.named_parameters()
    }
    buffers = {id(buffer): buffer.to(device) for buffer in model.buffers()}

    def place() -> None:
        for module in model.modules():
            for own, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[own] = made[id(parameter)].put()
            for own, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[own] = buffers[id(buffer)]

    return place


def _placed(parameter: nn.Parameter, tensor: torch.Tensor, stays: bool, device: torch.device) -> _Placed:
    if stays:
        return _Placed(like(hosted(tensor, device, LEAST_INNER_BYTES if is_nested(tensor) else 0), parameter))
    if type(parameter) is not nn.Parameter:
        moved = parameter.to(device)
        return _Placed(moved if isinstance(moved, nn.Parameter) else like(moved, parameter))
    moved = tensor.to(device)
    if bytes_under(tensor).in_file and device.type == "cpu":
        moved = tensor.clone()
    return _Placed(like(moved, parameter)) if parameter.device.type == "meta" else _Placed(parameter, moved)
