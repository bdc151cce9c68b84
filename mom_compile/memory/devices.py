"""Recorded devices, with the figures of their vendors' data sheets. Plans derive rows, times and memories from them.

Terms
-----
flops       Dense FLOPS in bf16 with float32 sums: half of what a data sheet prints "with sparsity".
bandwidth   Bytes per second of the device's memory.
memory      Bytes of the device. A GB in a data sheet is counted as a GiB. Drivers report up to 1 % less.
link        Bytes per second between host and device, in one direction. PCIe 4.0 x16 (32 GB/s) and 5.0 x16 (64 GB/s)
            are taken to reach 25/32 of their rate. The H200's link was measured
            (`benchmarks/results/h200-2026-11-28.json`).
capability  NVIDIA's compute capability: 90 stands for 9.0. For an AMD GPU, the first two digits of its architecture.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

GIB = 1 << 30
_PCIE_4, _PCIE_5 = 25e9, 50e9


@dataclass(frozen=True)
class Device:
    """The figures of a GPU, in the units above, and its number of multiprocessors."""

    flops: float
    bandwidth: float
    multiprocessors: int
    capability: int
    memory: int
    link: float


#: Keys are words of `torch.cuda.get_device_name()`.
DEVICES = {
    # NVIDIA A100 Tensor Core GPU data sheet (2021), SXM: 312 TFLOPS, 2,039 GB/s with 80 GB and 1,555 GB/s with 40 GB,
    # PCIe 4.0.
    "A100": Device(312e12, 2.039e12, 108, 80, 80 * GIB, _PCIE_4),
    "A100 40GB": Device(312e12, 1.555e12, 108, 80, 40 * GIB, _PCIE_4),
    # NVIDIA H100 and H200 Tensor Core GPU data sheets: SXM, 1,979 TFLOPS with sparsity, PCIe 5.0. The H200's link was
    # measured.
    "H100": Device(989.4e12, 3.35e12, 132, 90, 80 * GIB, _PCIE_5),
    # NVIDIA H100 PCIe product brief and H100 Tensor Core GPU data sheet: 756 TFLOPS, 2.0 TB/s, 114 multiprocessors; the
    # NVL has 1,671 TFLOPS with sparsity, 3.9 TB/s, 94 GB and 132 multiprocessors. PCIe 5.0.
    "H100 PCIe": Device(756e12, 2.0e12, 114, 90, 80 * GIB, _PCIE_5),
    "H100 NVL": Device(835.5e12, 3.9e12, 132, 90, 94 * GIB, _PCIE_5),
    "H200": Device(989.4e12, 4.8e12, 132, 90, 141 * GIB, 53.6e9),
    # NVIDIA DGX B200 data sheet, an eighth of the system: 72 PFLOPS in fp8 with sparsity (36 in bf16), 64 TB/s, 1,440
    # GB, PCIe 5.0.
    "B200": Device(2.25e15, 8e12, 148, 100, 180 * GIB, _PCIE_5),
    # NVIDIA GB200 NVL72 page, one of a superchip's two GPUs: 5 PFLOPS with sparsity, 8 TB/s, 186 GB. NVLink-C2C has
    # 900 GB/s for both GPUs and both directions: 225 GB/s in one direction for each GPU, of which 25/32 are counted.
    # NVIDIA prints no number of multiprocessors for it. 152 is what GB200s report in published device
    # properties and profiles (`multi_processor_count=152, cc=100` in kernels that Inductor has generated there); a B200
    # reports 148 (pytorch/ao#4002).
    "GB200": Device(2.5e15, 8e12, 152, 100, 186 * GIB, 176e9),
    # NVIDIA Ada GPU architecture whitepaper, appendix A: 165.2 TFLOPS with FP32 accumulation, 1,008 GB/s, PCIe 4.0.
    "RTX 4090": Device(165.2e12, 1.008e12, 128, 89, 24 * GIB, _PCIE_4),
    # NVIDIA L40S and L4 data sheets: 362.05 and 121 TFLOPS, 864 and 300 GB/s, PCIe 4.0. ECC, which is on
    # by default, takes a 16th of their 48 and 24 GB.
    "L40S": Device(362.05e12, 0.864e12, 142, 89, 45 * GIB, _PCIE_4),
    "L4": Device(121e12, 0.3e12, 58, 89, 45 * GIB // 2, _PCIE_4),
    # NVIDIA RTX Blackwell GPU architecture whitepaper: 209.5 TFLOPS with FP32 accumulation, 1,792 GB/s, PCIe 5.0.
    "RTX 5090": Device(209.5e12, 1.792e12, 170, 120, 32 * GIB, _PCIE_5),
    # NVIDIA Ampere GA102 GPU architecture whitepaper: 71 TFLOPS with FP32 accumulation, 936 GB/s, PCIe 4.0.
    "RTX 3090": Device(71e12, 0.936e12, 82, 86, 24 * GIB, _PCIE_4),
    # AMD Instinct MI300X data sheet: 1,307.4 TFLOPS, 5.3 TB/s, 304 compute units, 192 GB, PCIe 5.0. ROCm is untested.
    "MI300X": Device(1307.4e12, 5.3e12, 304, 94, 192 * GIB, _PCIE_5),
}
#: Names with the amount of memory, for cards that the table has without it.
_SIZED = {"a10080gb": "A100", "h10080gb": "H100", "h200141gb": "H200"}
_MAKERS = re.compile(r"nvidia|geforce|amd|instinct|tesla")


@dataclass(frozen=True)
class Properties:
    """Properties that a GPU reports."""

    name: str
    multiprocessors: int
    capability: int


def find_device(name: str) -> str | None:
    """Return the recorded device with this name; None if there is none. Case, spaces and the maker do not matter:
    "rtx4090", "4090" and "NVIDIA A100-80GB" are names of devices."""
    wanted = _plain(name)
    plain = {_plain(known): known for known in DEVICES}
    return _SIZED.get(wanted) or plain.get(wanted) or plain.get(f"rtx{wanted}")


def nearest_device(name: str) -> str | None:
    """Return the recorded device with the most similar name."""
    plain = {_plain(known): known for known in DEVICES}
    near = difflib.get_close_matches(_plain(name), plain, n=1, cutoff=0.6)
    return plain[near[0]] if near else None


def _plain(name: str) -> str:
    return re.sub("[^a-z0-9]", "", _MAKERS.sub("", name.lower()))


def device_of(gpu: Properties) -> tuple[Device, str]:
    """Return the figures of a GPU, and a text that names their source.

    A GPU that is not recorded has the figures of a recorded one, with FLOPS and bandwidth in proportion to its number
    of multiprocessors. This is the device that its name contains (a laptop's RTX 4090, a part of an H100), or else the
    one with the nearest compute capability; of two that are equally near, the older.
    """
    words = set(re.split(r"[^A-Za-z0-9]+", gpu.name))
    named = [name for name in DEVICES if words.issuperset(name.split())]
    if named:
        name = max(named, key=len)  # "A100 40GB" rather than "A100"
        like = DEVICES[name]
        if like.multiprocessors == gpu.multiprocessors:
            return like, gpu.name
    else:
        name, like = min(DEVICES.items(), key=lambda one: (abs(one[1].capability - gpu.capability), one[1].capability))
    part = gpu.multiprocessors / like.multiprocessors
    own = Device(
        like.flops * part, like.bandwidth * part, gpu.multiprocessors, gpu.capability, like.memory, like.link
    )
    of = f"{gpu.multiprocessors} of the {like.multiprocessors} multiprocessors of an {name}"
    return own, f"{gpu.name}, taken for {of}"
