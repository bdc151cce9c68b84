"""Checks of a machine for the backend, one small function each. A check returns what it found, a state and a remedy.

Terms
-----
state    OK; LIMITED: something does not work, is slow or untested; BROKEN: the backend cannot work.
finding  The result of a check. Checks change nothing, except for a temporary file.
"""

from __future__ import annotations

import enum
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from mom_compile.report.units import in_units
from mom_compile.runtime.host.limits import available_memory
from mom_compile.torch_compat.cpp_kernels import cxx_compiler
from mom_compile.torch_compat.inductor import compile_cache_folder
from mom_compile.versions import TESTED, is_older, is_tested, running

#: Free space for the compiled graphs of a model or two; with less, a compilation may fail.
LEAST_DISK = 1 << 30
#: Bytes pinned at a time for keys and values, see `runtime/host/backings/pinned.py`.
PINNED_AT_ONCE = 64 << 20
#: The lowest capability that Inductor generates Triton code for.
LEAST_CAPABILITY = (7, 0)


class State(enum.Enum):
    OK = "ok"
    LIMITED = "limited"
    BROKEN = "broken"


@dataclass(frozen=True)
class Finding:
    """The `name` of a check, what it `found`, and a `remedy` unless the state is OK."""

    name: str
    state: State
    found: str
    remedy: str = ""


def findings() -> list[Finding]:
    """Run all checks, in the order of the report. Does not raise."""
    checks: tuple[Callable[[], Finding], ...] = (
        python, pytorch, transformers, backend, gpu, triton, compiler, cache_folder, disk, pinned_memory,
    )  # fmt: skip
    return [_guarded(check) for check in checks]


def _guarded(check: Callable[[], Finding]) -> Finding:
    """Run a check; an exception becomes a finding."""
    try:
        return check()
    except Exception as error:
        name = check.__name__.replace("_", " ")
        return Finding(name, State.LIMITED, f"the check failed: {type(error).__name__}: {error}", "report this")


# --- versions ---


def python() -> Finding:
    return _version("Python", running()["Python"])


def pytorch() -> Finding:
    return _version("torch", str(torch.__version__))


def transformers() -> Finding:
    found = _installed("transformers")
    if found is None:
        remedy = "pip install transformers (for plan, and for explain of a config; other models do not need it)"
        return Finding("transformers", State.LIMITED, "not installed", remedy)
    return _version("transformers", found)


def _version(name: str, found: str) -> Finding:
    """OK within the tested range, LIMITED after it (unverified), BROKEN before it for torch (missing features)."""
    first, last = TESTED[name]
    if is_tested(name, found):
        return Finding(name, State.OK, f"{found} (tested: {first} to {last})")
    state = State.BROKEN if name == "torch" and is_older(name, found) else State.LIMITED
    return Finding(name, state, f"{found}, outside the tested range", f"install {name} {first} to {last}")


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def backend(names: Collection[str] | None = None) -> Finding:
    """Whether `torch.compile(backend="mom")` finds the backend, by the entry point of the installed package."""
    known = torch.compiler.list_backends() if names is None else names
    if "mom" in known:
        return Finding("backend", State.OK, 'torch.compile finds backend="mom"')
    remedy = "pip install mom_compile (in a checkout: pip install -e .)"
    return Finding("backend", State.BROKEN, 'torch.compile knows no backend "mom"', remedy)


# --- devices ---


def gpu() -> Finding:
    """The current CUDA device. Never run on a GPU."""
    if not torch.cuda.is_available():
        if torch.version.cuda is None and torch.version.hip is None:
            remedy = "for a GPU, install PyTorch's CUDA build (pytorch.org/get-started)"
            return Finding("GPU", State.LIMITED, "none: this PyTorch is built for CPUs only", remedy)
        remedy = "nvidia-smi must list it; containers need access to it (docker run --gpus all)"
        return Finding("GPU", State.LIMITED, "none that PyTorch can use", remedy)
    capability, (free, total) = torch.cuda.get_device_capability(), torch.cuda.mem_get_info()
    found = f"{torch.cuda.get_device_name()}, {in_units(free)} of {in_units(total)} free, CUDA {torch.version.cuda}"
    if torch.version.hip is not None:
        return Finding("GPU", State.LIMITED, f"{found}, ROCm {torch.version.hip}", "ROCm has not been tested")
    if capability < LEAST_CAPABILITY:
        least = ".".join(map(str, LEAST_CAPABILITY))
        remedy = f"Inductor supports capability {least} and later: use the CPU or another GPU"
        return Finding("GPU", State.LIMITED, f"{found}, capability {capability[0]}.{capability[1]}", remedy)
    return Finding("GPU", State.OK, found)


def triton(has_gpu: bool | None = None) -> Finding:
    """Triton, which Inductor needs for GPUs only."""
    found, needed = _installed("triton"), torch.cuda.is_available() if has_gpu is None else has_gpu
    if found is not None:
        return Finding("Triton", State.OK, found if needed else f"{found} (only for GPUs)")
    if not needed:
        return Finding("Triton", State.OK, "not installed, and not needed without a GPU")
    return Finding("Triton", State.BROKEN, "not installed", "pip install triton, the version that PyTorch requires")


# --- compilation ---

_PROGRAM = "#include <cmath>\n#include <omp.h>\nint main() { return omp_get_max_threads() > 0 ? 0 : 1; }\n"
_GET_COMPILER = "install one (Debian, Ubuntu: apt install g++) or name one in CXX"


def compiler(has_gpu: bool | None = None) -> Finding:
    """A C++ compiler with OpenMP, which Inductor uses for the CPU. Compiles a program of three lines."""
    on_gpu = torch.cuda.is_available() if has_gpu is None else has_gpu
    bad = State.LIMITED if on_gpu else State.BROKEN
    try:
        path = cxx_compiler()
    except Exception as error:  # Inductor raises various errors if it finds none
        return Finding("C++ compiler", bad, f"none: {_first_line(error)}", _GET_COMPILER)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "program.cpp")
        source.write_text(_PROGRAM)
        openmp = ["-Xpreprocessor", "-fopenmp"] if sys.platform == "darwin" else ["-fopenmp"]
        command = [path, "-std=c++17", *openmp, "-c", str(source), "-o", str(Path(folder, "program.o"))]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
        except FileNotFoundError:
            return Finding("C++ compiler", bad, f"{path} does not exist", _GET_COMPILER)
        except subprocess.CalledProcessError as failed:
            why = next((line for line in failed.stderr.splitlines() if "error" in line), "no message")
            return Finding("C++ compiler", bad, f"{path} does not compile C++17 with OpenMP: {why}", _GET_COMPILER)
        except (subprocess.TimeoutExpired, OSError) as error:
            return Finding("C++ compiler", bad, f"{path} cannot be run: {_first_line(error)}", _GET_COMPILER)
    return Finding("C++ compiler", State.OK, shutil.which(path) or path)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


_OTHER_FOLDER = "set TORCHINDUCTOR_CACHE_DIR to a writable folder that allows loading libraries"


def cache_folder() -> Finding:
    """The folder where Inductor writes compiled code and loads it from."""
    try:
        folder = compile_cache_folder()
        with tempfile.NamedTemporaryFile(dir=folder, prefix="mom-doctor-") as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        where = error.filename or os.environ.get("TORCHINDUCTOR_CACHE_DIR", "it")
        return Finding("compile cache", State.BROKEN, f"cannot write to {where}: {error.strerror}", _OTHER_FOLDER)
    if os.statvfs(folder).f_flag & os.ST_NOEXEC:
        return Finding("compile cache", State.BROKEN, f"{folder} is on a file system mounted noexec", _OTHER_FOLDER)
    return Finding("compile cache", State.OK, folder)


def disk(folder: str | Path | None = None) -> Finding:
    """Space for compiled code. A KV cache on disk (`kv_offload="disk"`) uses its own folder."""
    where = Path(folder or compile_cache_folder())
    free = shutil.disk_usage(where).free
    found = f"{in_units(free)} free in the folder of the compile cache"
    if free < LEAST_DISK:
        remedy = f"free some space, or set TORCHINDUCTOR_CACHE_DIR to another disk: {in_units(LEAST_DISK)} is advised"
        return Finding("disk", State.LIMITED, found, remedy)
    return Finding("disk", State.OK, found)


# --- host memory ---


def locked_limit() -> int | None:
    """Bytes that this process may lock (RLIMIT_MEMLOCK); None if unlimited."""
    import resource  # missing on Windows, where this check then fails

    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def pinned_memory(has_gpu: bool | None = None) -> Finding:
    """Available host memory, which a container may limit, and whether it can be pinned for asynchronous copies.

    Without a GPU nothing is pinned. Never run on a GPU.
    """
    room, limit = available_memory(), locked_limit()
    found = "host memory unknown" if room is None else f"{in_units(room)} of host memory available"
    if not (torch.cuda.is_available() if has_gpu is None else has_gpu):
        return Finding("pinned memory", State.OK, f"{found}; not pinned without a GPU")
    try:
        torch.empty(PINNED_AT_ONCE, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        remedy = "raise the container's limits (docker run --ulimit memlock=-1), or set kv_offload=False"
        what = f"{found}; cannot pin {in_units(PINNED_AT_ONCE)}: {_first_line(error)}"
        return Finding("pinned memory", State.LIMITED, what, remedy)
    if limit is not None and limit < (room or 0):
        remedy = "ulimit -l unlimited (docker run --ulimit memlock=-1): some drivers count pinned memory towards it"
        return Finding("pinned memory", State.LIMITED, f"{found}; RLIMIT_MEMLOCK is {in_units(limit)}", remedy)
    return Finding("pinned memory", State.OK, found)
