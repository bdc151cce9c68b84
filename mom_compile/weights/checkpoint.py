"""The tensors of a folder's safetensors files by name, mapped and not read yet.

    8 bytes: n, the size of the header | n bytes of JSON: name -> dtype, shape, data_offsets | the tensors' bytes

https://github.com/huggingface/safetensors#format. The safetensors library also maps files, but writable: a memory limit
counts such a mapping as if all of it were written.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mom_compile.runtime.host.weight_bytes import WeightBytes, map_file

INDEX = "model.safetensors.index.json"

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip

#: `owner/model`, or a model without an owner, as named on the Hugging Face hub.
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

#: The size of the header's size.
_PREFIX = 8


@dataclass(frozen=True)
class Checkpoint:
    """`tensors` show the files' bytes; `holders` keep them alive."""

    directory: Path
    tensors: dict[str, torch.Tensor]
    holders: tuple[WeightBytes, ...]

    @staticmethod
    def open(directory: Path) -> Checkpoint:
        """Raises `ValueError` naming the file that is missing, truncated or not in this format."""
        tensors: dict[str, torch.Tensor] = {}
        holders = []
        for path in _files(directory):
            try:
                holder, found = _mapped(path)
            except OSError as error:
                raise ValueError(f"{str(path)!r} cannot be read: {error.strerror}") from error
            tensors |= found
            holders.append(holder)
        return Checkpoint(directory, tensors, tuple(holders))

    def get(self, name: str) -> torch.Tensor | None:
        return self.tensors.get(name)


def _files(directory: Path) -> list[Path]:
    if not directory.is_dir():
        raise ValueError(
            f"{str(directory)!r} is not a folder; expected a folder with safetensors files{_on_the_hub(directory)}"
        )
    index = directory / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{str(index)!r} is not an index of safetensors files: {error!r}") from error
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise ValueError(f"{str(index)!r} names {missing[0]!r}, which is missing: download the checkpoint again")
        return [directory / name for name in names]
    found = sorted(directory.glob("*.safetensors"))
    if not found:
        raise ValueError(f"{str(directory)!r} has no safetensors files: save the model with save_pretrained first")
    return found


def _on_the_hub(directory: Path) -> str:
    """Return advice for a missing path that may be the name of a model on the Hugging Face hub."""
    name = directory.as_posix()
    if not _HUB_NAME.fullmatch(name):
        return ""
    return (
        f". Nothing is downloaded here, whatever HF_HUB_OFFLINE and HF_HOME are. If it is a model on the Hugging Face "
        f"hub, download it with `hf download {name} --local-dir FOLDER` (`huggingface-cli download` with "
        f"huggingface_hub below 1.0) and pass FOLDER"
    )


def _mapped(path: Path) -> tuple[WeightBytes, dict[str, torch.Tensor]]:
    header, begin = _header(path)
    size = path.stat().st_size
    # Reading a mapped tensor beyond the end of the file would crash the process.
    for name, entry in header.items():
        if begin + entry["data_offsets"][1] > size:
            raise ValueError(
                f"{str(path)!r} ends at byte {size}, before the end of {name} (byte "
                f"{begin + entry['data_offsets'][1]}): it is truncated, download it again"
            )
    holder = map_file(path)
    tensors = {}
    for name, entry in header.items():
        shape, dtype = entry["shape"], _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise ValueError(f"{name} in {str(path)!r} has type {entry['dtype']}, which this PyTorch does not support")
        first, end = entry["data_offsets"]
        if math.prod(shape) * dtype.itemsize != end - first:
            raise ValueError(f"{name} in {str(path)!r} is {entry['dtype']} {shape}, but has {end - first} bytes")
        tensors[name] = _tensor_at(holder, begin + entry["data_offsets"][0], shape, dtype)
    return holder, tensors


def _tensor_at(holder: WeightBytes, first: int, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor of the file. It is copied if its offset is not a multiple of the element size."""
    size = math.prod(shape) * dtype.itemsize
    raw = holder.region.bytes[first : first + size]
    if first % dtype.itemsize:
        raw = raw.clone()
    with torch.inference_mode(False):
        return raw.view(dtype).view(shape)


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the header's entries by name, and the offset of the tensors' bytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_PREFIX), "little")
        text = file.read(length) if _PREFIX + length <= size else b""
    try:
        found = json.loads(text)
        found.pop("__metadata__", None)
        for entry in found.values():
            first, end = entry["data_offsets"]
            assert 0 <= first <= end and isinstance(entry["dtype"], str)
            assert all(isinstance(size, int) and size >= 0 for size in entry["shape"])
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise ValueError(f"{str(path)!r} is not a safetensors file or is truncated: its header is invalid") from error
    return found, _PREFIX + length
