"""The C++ compiler that Inductor starts for kernels on the CPU.

AsyncCompile.wait               a module that Inductor generates starts a compiler for each of its kernels and ends with
                                `async_compile.wait(globals())`, which replaces the futures in the module by kernels
CppPythonBindingsCodeCache      compiles the C++ source of a kernel and loads it
get_cpp_compiler                the compiler that Inductor uses
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch._inductor import config as inductor_config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import CppPythonBindingsCodeCache
from torch._inductor.cpp_builder import get_cpp_compiler

from mom_compile.torch_compat.scoped import replaced


@contextlib.contextmanager
def defer_kernel_waits(devices: Collection[torch.device]) -> Iterator[list[Callable[[], None]]]:
    """Let this thread compile with Inductor without waiting for C++ compilers.

    A model has one graph for stock Inductor and many pieces for us. With the wait in each of them, the passes are idle
    while a compiler works on a piece, and compilers are idle while the passes work on the next piece. Inductor 2.11 to
    2.14 has no setting for this. `AsyncCompile.wait` is replaced in the block; other threads still wait.

    On GPUs nothing is deferred: Inductor stores Triton's output in its cache when it has compiled a graph.

    Yields
    ------
    The deferred waits, to be called before the compiled code is. Each raises the error of its compiler.
    """
    waits: list[Callable[[], None]] = []
    if inductor_config.cpu_backend != "cpp" or any(device.type != "cpu" for device in devices):
        yield waits
        return
    thread, wait_now = threading.get_ident(), AsyncCompile.wait

    def wait(loading: AsyncCompile, scope: dict[str, Any]) -> None:
        if threading.get_ident() == thread:
            waits.append(functools.partial(wait_now, loading, scope))
        else:
            wait_now(loading, scope)

    with replaced(AsyncCompile, "wait", wait):
        yield waits


def cxx_compiler() -> str:
    """Return the C++ compiler that Inductor uses. Raises `RuntimeError` if there is none."""
    return get_cpp_compiler()


_compiler_started = threading.Event()
#: A kernel that includes the header of all generated kernels.
_FIRST_KERNEL = """#include <torch/csrc/inductor/cpp_prefix.h>
extern "C" void kernel(float* out) { at::vec::Vectorized<float>(0.0f).store(out); }
"""


def start_the_compiler() -> None:
    """Compile a kernel in a thread, once per process, so that Inductor's first kernel need not wait.

    With its first kernel, Inductor compiles a test program for each set of vector instructions, and the header of all
    kernels. It stores both on disk. Errors are ignored here: the first real kernel raises them again.

    The thread is not a daemon: a process that ends early would leave half a header for the next process.
    """
    if not _compiler_started.is_set():
        _compiler_started.set()
        threading.Thread(target=_compile_first_kernel, name="mom_compile: first kernel").start()


def _compile_first_kernel() -> None:
    with contextlib.suppress(Exception):
        CppPythonBindingsCodeCache.load_pybinding(["float*"], _FIRST_KERNEL)
