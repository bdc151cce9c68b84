"""A simulated GPU: Inductor and Triton compile for it, cubins included, and nothing is launched.

    with pretended(H100) as made:
        compile_graph(graph whose tensors are on cuda:0, ...)
    made.kernels        every configuration of every kernel: source, registers, stack
    made.wrappers       the Python code that would launch them

Patched:

    Triton      the driver, for its compile target
    Dynamo      the device interface, which Inductor uses too: properties, streams and the current device
    torch.cuda  properties and capabilities

`torch.cuda.is_available()` is not patched. A CPU build of PyTorch and the `triton` wheel, which contains ptxas and
cuobjdump, are enough.
"""

from __future__ import annotations

import contextlib
import functools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch._dynamo.device_interface as interfaces
from torch._inductor import config as inductor_config
from torch._inductor.async_compile import CompiledTritonKernels
from torch._inductor.codecache import PyCodeCache
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import hints, triton_helpers, triton_heuristics
from torch.utils import _triton as torch_triton

triton = pytest.importorskip("triton", reason="the triton wheel is not installed (extra test-triton)")

from triton.backends.compiler import GPUTarget  # noqa: E402  after the check that there is one
from triton.backends.driver import DriverBase  # noqa: E402

CUDA = torch.device("cuda:0")


@dataclass(frozen=True)
class Gpu:
    """A device's properties that Inductor reads. Sizes in bytes."""

    name: str
    major: int
    minor: int
    multi_processor_count: int
    shared_memory_per_block_optin: int
    shared_memory_per_multiprocessor: int
    L2_cache_size: int
    total_memory: int = 80 << 30
    regs_per_multiprocessor: int = 65536
    max_threads_per_multi_processor: int = 2048
    max_threads_per_block: int = 1024
    warp_size: int = 32
    shared_memory_per_block: int = 49152
    gcnArchName: str = ""

    @property
    def capability(self) -> int:
        return self.major * 10 + self.minor


H100 = Gpu("pretended H100", 9, 0, 132, 232448, 233472, 50 << 20)
H200 = Gpu("pretended H200", 9, 0, 132, 232448, 233472, 50 << 20, total_memory=141 << 30)
A100 = Gpu("pretended A100", 8, 0, 108, 166912, 167936, 40 << 20)
B200 = Gpu("pretended B200", 10, 0, 148, 232448, 233472, 126 << 20, total_memory=180 << 30)
RTX_4090 = Gpu("pretended RTX 4090", 8, 9, 128, 101376, 102400, 72 << 20, total_memory=24 << 30)


@dataclass(frozen=True)
class Kernel:
    """One compiled configuration of a kernel."""

    name: str
    source: str
    signature: dict[str, str]
    cubin: bytes
    #: Registers of a thread, and bytes of local memory, which contains spilled registers.
    registers: int
    stack: int
    #: Number of the wrapper that launches it.
    wrapper: int


@dataclass
class Made:
    kernels: list[Kernel] = field(default_factory=list)
    wrappers: list[str] = field(default_factory=list)


class Driver(DriverBase):  # type: ignore[misc]
    """Triton's driver, which states the compile target."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("nothing is launched")

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", self.gpu.capability, self.gpu.warp_size)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing is launched")

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


@contextlib.contextmanager
def pretended(gpu: Gpu) -> Iterator[Made]:
    """In this context compilers see `cuda:0` as this device. Nothing is cached or kept afterwards."""
    made = Made()
    before = triton.runtime.driver._active
    _forget()
    with contextlib.ExitStack() as stack:
        for patch in (*_patches_of_torch(gpu), *_patches_of_inductor(made)):
            stack.enter_context(patch)
        triton.runtime.driver.set_active(Driver(gpu))
        try:
            yield made
        finally:
            triton.runtime.driver._active = before
            _forget()


def _forget() -> None:
    """Clear torch's caches of devices, and of kernels by source, which have no launcher."""
    for function in (
        torch_triton.has_triton,
        torch_triton.triton_backend,
        torch_triton.triton_hash_with_backend,
        hints.DeviceProperties.create,
    ):
        getattr(function, "cache_clear", lambda: None)()
    CompiledTritonKernels.cache_clear()
    PyCodeCache.cache_clear()


def _interface(gpu: Gpu) -> type:
    def constant(value: Any) -> staticmethod[..., Any]:
        return staticmethod(lambda *_, **__: value)

    worker = {"set_device": constant(None), "current_device": constant(0), "get_device_properties": constant(gpu)}
    answers = {
        **worker,
        "Worker": type("Worker", (), worker),
        "device_count": constant(1),
        "synchronize": constant(None),
        "get_raw_stream": constant(0),
        "exchange_device": constant(0),
        "maybe_exchange_device": constant(0),
        "memory_allocated": constant(0),
        "is_bf16_supported": constant(True),
        "is_available": constant(True),
        "get_compute_capability": constant(gpu.capability),
        "is_triton_capable": constant(True),
        "raise_if_triton_unavailable": constant(None),
    }
    return type("PretendedInterface", (interfaces.CudaInterface,), answers)


def _patches_of_torch(gpu: Gpu) -> list[Any]:
    interfaces.get_registered_device_interfaces()  # registers the defaults, which would overwrite ours later
    interface = _interface(gpu)

    def cuda(name: str, value: Any) -> Any:
        return mock.patch.object(torch.cuda, name, return_value=value)

    return [
        mock.patch.dict(interfaces.device_interfaces, {"cuda": interface, "cuda:0": interface}),
        cuda("get_device_properties", gpu),
        cuda("get_device_capability", (gpu.major, gpu.minor)),
        cuda("get_device_name", gpu.name),
        cuda("current_device", 0),
        cuda("device_count", 1),
        cuda("is_bf16_supported", True),
        cuda("_lazy_init", None),
        mock.patch.object(torch.version, "cuda", torch.version.cuda or "13.0"),
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", _the_stream, create=True),
    ]


def _the_stream(device: int) -> int:
    """A plain function: a mock would take longer than the call that it replaces."""
    return 0


def _patches_of_inductor(made: Made) -> list[Any]:
    def keep(self: Any, *_: Any) -> None:
        """Replaces the loading of binaries."""
        wrapper = len(made.wrappers) - 1  # a wrapper is written before its kernels are compiled
        results = [result for result in self.compile_results if hasattr(result.kernel, "asm")]
        made.kernels.extend(_kernel(self, result, wrapper) for result in results)
        self.launchers = []

    autotuner, static = triton_heuristics.CachingAutotuner, triton_heuristics.StaticTritonCompileResult
    return [
        mock.patch.object(triton_helpers, "set_driver_to_gpu", return_value=None),
        mock.patch.object(autotuner, "_make_launchers", keep),
        mock.patch.object(autotuner, "_dynamic_scale_rblock", return_value=None),
        mock.patch.object(static, "can_statically_launch", staticmethod(lambda *_: None)),
        mock.patch.object(GraphLowering, "save_output_code", staticmethod(made.wrappers.append)),
        inductor_config.patch(compile_threads=1, force_disable_caches=True),
    ]


def _kernel(autotuner: Any, result: Any, wrapper: int) -> Kernel:
    cubin = result.kernel.asm["cubin"]
    registers, stack = _usage(cubin)
    signature = {name: str(kind) for name, kind in autotuner.triton_meta["signature"].items()}
    return Kernel(autotuner.fn.__name__, autotuner.fn.src, signature, cubin, registers, stack, wrapper)


@functools.cache
def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack, read from the binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_TOOLS / "cuobjdump"), "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found is not None, f"cuobjdump says nothing of registers:\n{said}"
    return int(found[1]), int(found[2])


_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
