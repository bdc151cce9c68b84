"""`offload_weights`: of a model's weights, what does not fit into a budget stays on the host.

    budget  >=  buffers, norms, what is kept  +  two units under way  +  units that stay

A unit is a layer, or what is outside the layers. Each that does not stay is read once per prefill and per decode step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from mom_compile.memory.device import available_bytes
from mom_compile.notices import warn_once
from mom_compile.quantities import parse_bytes
from mom_compile.report.units import in_units
from mom_compile.runtime.host.engine_cuda import pin_for
from mom_compile.runtime.host.limits import HostMemoryError
from mom_compile.runtime.host.weight_bytes import bytes_under, pin_in_place
from mom_compile.weights.checkpoint import Checkpoint
from mom_compile.weights.living import hosted, like, live_with
from mom_compile.weights.nested import LEAST_INNER_BYTES, fault_of, is_nested, is_on_host, leaves
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
            f"{in_units(self.on_host)} on the host are read at most once per prefill and per token"
            + (f", of {in_units(self.tables)} of embeddings only rows" if self.tables else "")
            + (f"; {in_units(self.mapped)} are mapped from files" if self.mapped else "")
        )

    def __repr__(self) -> str:
        return f"<OffloadedWeights: {self}>"


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
    files = Checkpoint.open(Path(directory)) if directory is not None else None
    _check_places(model, files)
    found = parameters_of(model, keep)
    budget = _budget(memory_budget, target)
    stay, leave = split(found, _buffer_bytes(model), budget)
    tensors = _tensors(model, files)
    under_way = 2 * max((unit.bytes for unit in leave if not unit.table), default=0)
    on_host = [name for unit in leave for name in unit.names]
    _check_kinds(model, on_host)
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
        live_with(model, target)
    return made


def least_budget(model: nn.Module, keep: Collection[str] = ()) -> int:
    """The smallest `memory_budget` with which weights of a model can be offloaded, in bytes."""
    return _least(parameters_of(model, keep), _buffer_bytes(model))


def _least(found: Parameters, buffers: int) -> int:
    """Two layers, and what is on the device in any case."""
    return found.resident_bytes + buffers + 2 * max((unit.bytes for unit in found.layers), default=0)


def split(found: Parameters, buffers: int, budget: int) -> tuple[list[Unit], list[Unit]]:
    """Units that stay on the device and those that do not. Raises `ValueError` where two layers do not fit."""
    every = found.resident_bytes + buffers + sum(unit.bytes for unit in found.units)
    if every <= budget:
        return list(found.units), []
    least = _least(found, buffers)
    if budget < least:
        raise ValueError(
            f"memory_budget={budget} bytes ({in_units(budget)}) cannot hold two layers of this model and what has to "
            f"be on the device beside them: the smallest budget is {least} bytes ({in_units(least)})"
        )
    stay = residents(found.layers, budget - least)
    names = {unit.name for unit in stay}
    return stay, [unit for unit in found.units if unit.name not in names]


# --------------------------------------------------------------------------------------------------- what is given


def _checked_device(device: torch.device | str) -> torch.device:
    try:
        target = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device!r} is not valid: {str(error).splitlines()[0]}") from None
    if target.type not in ("cpu", "cuda"):
        raise ValueError(f"device={device!r}: weights can be kept on the host for a CUDA device, or for 'cpu'")
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={device!r} does not exist here: {torch.cuda.device_count()} CUDA devices do")
    return torch.device("cuda", torch.cuda.current_device()) if str(target) == "cuda" else target


def _check_places(model: nn.Module, files: Checkpoint | None) -> None:
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(f"{name} has no size yet: call the model once before its weights are offloaded")
        if is_on_host(parameter):
            raise ValueError(f"{name} is kept on the host already: offload_weights was called on this model before")
        found = _in_files(files, name, parameter)
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


def _in_files(files: Checkpoint | None, name: str, parameter: nn.Parameter) -> torch.Tensor | None:
    """A parameter's bytes in its file. A quantised one is not what the file has under its name."""
    return None if files is None or is_nested(parameter) else files.get(name)


def _tensors(model: nn.Module, files: Checkpoint | None) -> dict[str, torch.Tensor]:
    """Each parameter's bytes on the host: in its file, or where it is."""
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
            raise ValueError(f"{name} cannot be kept on the host: it {fault}")


# ------------------------------------------------------------------------------------------------- where they go


def _pin(tensors: list[torch.Tensor], device: torch.device) -> None:
    if device.type != "cuda" or not tensors:
        return
    try:
        pin_in_place(tensors, pin_for(device))
    except HostMemoryError as error:
        warn_once(
            "weights are not pinned",
            f"weights on the host cannot be pinned, so their copies go through the driver's own buffers and do not run "
            f"beside the computation: {error}",
        )


@dataclass(frozen=True)
class _Placed:
    """What will be in a parameter's place: another one, or itself with other bytes."""

    parameter: nn.Parameter
    data: torch.Tensor | None = None

    def put(self) -> nn.Parameter:
        if self.data is not None:
            self.parameter.requires_grad_(False)
            self.parameter.data = self.data
        return self.parameter


def _placing(
    model: nn.Module, tensors: dict[str, torch.Tensor], on_host: set[str], device: torch.device
) -> Callable[[], None]:
    """Makes what parameters and buffers will be; and then puts all of it there. Only the first may fail.

    A parameter that several modules have stays one.
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
