"""Every way to a tensor that no operator sees, or that changes more than bytes, and what a host tensor has to say.

Run as a program it walks them all, and prints a line of JSON for each: what goes wrong here may end the process.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch.utils import dlpack

from mom_compile import HostTensor
from mom_compile.runtime.host.tensor import on_host

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Door:
    """A way, and a part of the error that it raises for a host tensor; None: it gives what a plain tensor gives."""

    call: Callable[[torch.Tensor], Any]
    error: str | None = None


def then(change: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], Any]:
    """What a tensor is after a change."""

    def call(tensor: torch.Tensor) -> Any:
        change(tensor)
        return tensor

    return call


def saved(tensor: torch.Tensor, load: dict[str, Any] | None = None, **how: Any) -> Any:
    buffer = io.BytesIO()
    torch.save({"keys": tensor}, buffer, **how)
    buffer.seek(0)
    return torch.load(buffer, **(load or {}))["keys"]


def swapped(tensor: torch.Tensor) -> torch.Tensor:
    other = torch.zeros(3)
    torch.utils.swap_tensors(tensor, other)
    return other


def module(tensor: torch.Tensor) -> torch.nn.Module:
    made = torch.nn.Module()
    made.register_buffer("keys", tensor)
    return made


def foreach(tensor: torch.Tensor) -> list[torch.Tensor]:
    both = [tensor, torch.ones(2)]
    torch._foreach_add_(both, 1.0)
    return both


STORAGE = "Access to the storage"
FETCH = r"tensor\.fetch\(\)"

POINTS: dict[str, Door] = {
    # its memory
    "untyped_storage": Door(lambda t: t.untyped_storage(), STORAGE),
    "storage": Door(lambda t: t.storage(), STORAGE),
    "typed storage": Door(lambda t: t._typed_storage(), STORAGE),
    "storage of another": Door(lambda t: torch.zeros(3).set_(t.untyped_storage(), 0, (120,), (1,)).sum(), STORAGE),
    "data_ptr": Door(lambda t: t.data_ptr(), r"data_ptr\(\)"),
    "data_ptr of the base class": Door(lambda t: torch._C.TensorBase.data_ptr(t), "Cannot access data pointer"),
    "share_memory_": Door(lambda t: t.share_memory_(), r"share_memory_\(\).*Send it"),
    "share_memory_ of the base class": Door(torch.Tensor.share_memory_, STORAGE),
    "share_memory of a module": Door(lambda t: module(t).share_memory(), r"share_memory_\(\)"),
    "is_shared": Door(lambda t: t.is_shared()),
    "apply_": Door(lambda t: t.apply_(lambda x: 0.0), r"apply_\(\)"),
    "map_": Door(lambda t: t.map_(t, lambda x, y: 0.0), r"map_\(\)"),
    "reduce_tensor": Door(lambda t: torch.multiprocessing.reductions.reduce_tensor(t)[0], STORAGE),
    "safetensors": Door(lambda t: save({"keys": t}), STORAGE + ".*" + FETCH),
    "to_dlpack": Door(lambda t: torch.from_dlpack(dlpack.to_dlpack(t)).sum(), "Cannot access data pointer"),
    "DLPack of the base class": Door(lambda t: torch.Tensor.__dlpack__(t), "Cannot access data pointer"),
    "DLPack without a copy": Door(lambda t: t.__dlpack__(copy=False), "without a copy.*" + FETCH),
    # copies for others
    "from_dlpack": Door(lambda t: torch.from_dlpack(t)),
    "from_dlpack of torch.utils": Door(lambda t: dlpack.from_dlpack(t)),
    "numpy from_dlpack": Door(lambda t: np.from_dlpack(t.clone())),
    "DLPack device": Door(lambda t: tuple(map(int, t.__dlpack_device__()))),
    "numpy": Door(lambda t: t.numpy()),
    "asarray": Door(lambda t: np.asarray(t)),
    "array of another type": Door(lambda t: np.array(t, dtype=np.float64)),
    "torch.tensor": Door(lambda t: torch.tensor(t.tolist())),
    "torch.asarray": Door(lambda t: torch.asarray(t, copy=True)),
    "tolist": Door(lambda t: t.tolist()),
    "item": Door(lambda t: t[0, 0, 0, 1].item()),
    "float": Door(lambda t: float(t[0, 0, 0, 1])),
    "index": Door(lambda t: list(range(200))[t[0, 0, 0, 3].long()]),
    "format": Door(lambda t: f"{t[0, 0, 0, 3]:.2f} {t[0, 0, 0, 1]}"),
    "pickle": Door(lambda t: pickle.loads(pickle.dumps(t))),
    "to another process": Door(lambda t: pickle.loads(ForkingPickler.dumps(t))),
    "torch.save": Door(lambda t: saved(t)),
    "torch.save, anything": Door(lambda t: saved(t, {"weights_only": False})),
    "torch.save, the older format": Door(lambda t: saved(t, _use_new_zipfile_serialization=False)),
    "torch.load to another device": Door(lambda t: saved(t, {"map_location": "meta"}).device.type),
    "copy": Door(copy.copy),
    "deepcopy": Door(copy.deepcopy),
    "to, a copy": Door(lambda t: t.to("cpu", copy=True)),
    "to, another type": Door(lambda t: t.to(torch.float64)),
    "to, another layout": Door(lambda t: t.to(memory_format=torch.channels_last)),
    "to meta": Door(lambda t: t.to("meta").device.type),
    "type_as": Door(lambda t: t.type_as(torch.zeros(1, dtype=torch.float64))),
    "type": Door(lambda t: t.type("torch.DoubleTensor")),
    "state_dict": Door(lambda t: module(t).state_dict()["keys"]),
    "module.to": Door(lambda t: module(t).to(torch.float64).keys),
    "load_state_dict": Door(then(lambda t: module(t).load_state_dict({"keys": torch.zeros(2, 3, 5, 4)}))),
    "vmap": Door(lambda t: torch.func.vmap(lambda row: row * 2)(t)),
    "autograd": Door(lambda t: torch.func.grad(lambda x: (x * x).sum())(t)),
    "swap_tensors": Door(swapped),
    # changes of more than bytes
    "data": Door(lambda t: t.data),
    "data, written": Door(then(lambda t: t.data.zero_())),
    "data =": Door(lambda t: setattr(t, "data", torch.zeros(2, 3, 5, 4)), r"\.data.*copy_\(\)"),
    "transpose_": Door(lambda t: t.transpose_(1, 2), r"transpose_\(\).*Use tensor\.transpose\(\)"),
    "swapaxes_": Door(lambda t: t.swapaxes_(1, 2), r"Use tensor\.transpose\(\)"),
    "t_": Door(lambda t: t[0, 0].t_(), r"Use tensor\.t\(\)"),
    "unsqueeze_": Door(lambda t: t.unsqueeze_(0), r"Use tensor\.unsqueeze\(\)"),
    "squeeze_": Door(lambda t: t.squeeze_(), r"Use tensor\.squeeze\(\)"),
    "as_strided_": Door(lambda t: t.as_strided_((2, 2), (1, 1)), r"Use tensor\.as_strided\(\)"),
    "resize_": Door(lambda t: t.resize_(2, 3), r"resize_\(\).*" + FETCH),
    "resize_as_": Door(lambda t: t.resize_as_(torch.zeros(2)), r"resize_as_\(\).*" + FETCH),
    "resize_as_ of another": Door(lambda t: torch.zeros(2).resize_as_(t).shape),
    "set_": Door(lambda t: t.set_(torch.zeros(3)), r"set_\(\).*" + FETCH),
    "set_ to nothing": Door(lambda t: t.set_(), r"set_\(\).*" + FETCH),
    "set_ of another": Door(lambda t: torch.zeros(3).set_(t), r"set_\(\).*" + FETCH),
    "detach_": Door(lambda t: t.detach_()),
    "requires_grad_": Door(lambda t: t.requires_grad_(False)),
    "foreach": Door(foreach),
    "foreach of another": Door(lambda t: torch._foreach_mul([t, torch.ones(2)], 2)),
    "foreach copy": Door(then(lambda t: torch._foreach_copy_([t], [torch.ones(2, 3, 5, 4)]))),
    "out": Door(then(lambda t: torch.add(t, 1, out=t))),
    "out of several": Door(then(lambda t: torch.sort(t, out=(t, torch.zeros(1, dtype=torch.long).resize_(0))))),
    "out of another size": Door(lambda t: torch.cat([t, t], out=t), r"cat.*result of shape \[4, 3, 5, 4\]"),
    "+=": Door(then(lambda t: t.__iadd__(t))),
}


def outcome(door: Door, tensor: torch.Tensor) -> Any:
    """What it gives, as what JSON has."""
    try:
        return _plain(door.call(tensor))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _plain(value: Any) -> Any:
    if isinstance(value, HostTensor):
        assert value.shape == value.host.shape
        value = value.fetch()
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return [str(value.dtype), list(value.shape), value.tolist()]
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value if isinstance(value, (str, int, float, bool)) else str(value)


def tensor() -> torch.Tensor:
    return torch.arange(120, dtype=torch.float32).view(2, 3, 5, 4).clone()


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # TypedStorage is deprecated
    for name, door in POINTS.items():
        sys.stdout.write(json.dumps([name, outcome(door, on_host(tensor(), CPU))]) + "\n")
        sys.stdout.flush()
