"""Compile all C++ kernels of a graph with one run of the compiler.

Inductor starts the compiler once per kernel. Nine tenths of each run is the same work: the compiler reads the header of
all kernels and instantiates its templates. Twelve kernels take 12.4 s of CPU time one by one and 2.4 s in one run
(g++ 12, AVX-512).

    install()       once per process; `tests/conftest.py` does

Sources are Inductor's, and the GIL stays locked while a kernel runs. Inductor's Python binding is replaced by ctypes,
and the optimisation level is lower. Inductor itself compiles the kernel of a graph with only one, a kernel that fails
to compile here, and all kernels if `compile_threads` is more than 1.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch._inductor import config
from torch._inductor.async_compile import AsyncCompile, get_compile_threads
from torch._inductor.codecache import CppPythonBindingsCodeCache

#: The sources are vectorised already, and no test measures the time of a kernel: less optimisation, no debug symbols.
FLAGS = ("-O1", "-g0")
#: What Inductor passes to kernels besides pointers.
SCALARS = {"int64_t": ctypes.c_int64, "long": ctypes.c_int64, "uintptr_t": ctypes.c_size_t, "float": ctypes.c_float}

_compile_one = AsyncCompile.cpp_pybinding
_wait = AsyncCompile.wait
_lock = threading.RLock()
#: Requested, not compiled yet.
_pending: list[Kernel] = []
#: By types of the arguments, source and settings.
_known: dict[Any, Kernel] = {}


class Libraries(CppPythonBindingsCodeCache):
    """Inductor's cache of compiled libraries, for libraries without a Python binding."""

    cache: dict[str, Any] = {}  # noqa: RUF012

    @classmethod
    def _load_library_inner(cls, path: str, key: str) -> Any:
        return ctypes.PyDLL(path)


class Kernel:
    """A kernel that is compiled when a graph with it is waited for, or when it is called."""

    def __init__(self, argtypes: Sequence[str], source: str, settings: dict[str, Any]) -> None:
        self.argtypes = [argtype.replace("const ", "") for argtype in argtypes]
        self.original = argtypes, source
        self.settings = settings
        self.run: Callable[..., Any] | None = None
        self.error: Exception | None = None

    def __call__(self, *args: Any) -> None:
        self.wait()
        assert self.run is not None
        self.run(*args)

    def wait(self) -> None:
        """Raise the compiler's error, if there is one."""
        compile_pending()
        if self.error is not None:
            raise self.error

    def compile_alone(self) -> None:
        try:
            with config.patch(self.settings):
                self.run = _compile_one(AsyncCompile(), *self.original)
        except Exception as error:
            self.error = error

    def code(self, name: str) -> str:
        """Return the kernel in a namespace, and a function that returns the message of the kernel's exception."""
        body = "\n".join(line for line in self.original[1].splitlines() if not line.startswith("#include"))
        names = [f"a{n}" for n in range(len(self.argtypes))]
        parameters = ", ".join(f"{argtype} {n}" for argtype, n in zip(self.argtypes, names, strict=True))
        return f"""
namespace {name} {{
{body.replace('extern "C"', "static")}
}}
extern "C" const char* call_{name}({parameters}) {{
    static thread_local std::string message;
    try {{ {name}::kernel({", ".join(names)}); return nullptr; }}
    catch (std::exception const& error) {{ message = error.what(); return message.c_str(); }}
}}
"""

    def bind(self, function: Any) -> None:
        pointers = [argtype.endswith("*") for argtype in self.argtypes]
        function.argtypes = [SCALARS.get(argtype, ctypes.c_void_p) for argtype in self.argtypes]
        function.restype = ctypes.c_char_p

        def run(*args: Any) -> None:
            values = zip(args, pointers, strict=True)
            message = function(*[value.data_ptr() if is_pointer else value for value, is_pointer in values])
            if message is not None:
                raise RuntimeError(message.decode())

        self.run = run


def compile_pending() -> None:
    with _lock:
        while _pending:
            settings = _pending[0].settings
            batch = [kernel for kernel in _pending if kernel.settings == settings]
            _pending[:] = [kernel for kernel in _pending if kernel.settings != settings]
            compile_batch(batch)


def compile_batch(kernels: Sequence[Kernel]) -> None:
    if len(kernels) > 1:
        try:
            with config.patch(kernels[0].settings):
                library = Libraries.load(library_of(kernels), extra_flags=FLAGS)
            for number, kernel in enumerate(kernels):
                kernel.bind(getattr(library, f"call_kernel_{number}"))
            return
        except Exception:  # one of them is wrong: which one?
            pass
    for kernel in kernels:
        kernel.compile_alone()


def library_of(kernels: Sequence[Kernel]) -> str:
    lines = [line for kernel in kernels for line in kernel.original[1].splitlines() if line.startswith("#include")]
    codes = [kernel.code(f"kernel_{number}") for number, kernel in enumerate(kernels)]
    return "\n".join([*dict.fromkeys(lines), "#include <string>", *codes])


def _request(compiler: AsyncCompile, argtypes: list[str], source: str) -> Any:
    if get_compile_threads() > 1 or not all(t.endswith("*") or t.replace("const ", "") in SCALARS for t in argtypes):
        return _compile_one(compiler, argtypes, source)
    saved = config.save_config_portable(ignore_private_configs=False)
    settings = {name: value for name, value in saved.items() if name.startswith(("cpp.", "aot_inductor."))}
    key = (tuple(argtypes), source, repr(settings))
    with _lock:
        kernel = _known.get(key)
        if kernel is None or kernel.error is not None:
            kernel = _known[key] = Kernel(argtypes, source, settings)
            _pending.append(kernel)
    return kernel


def _wait_for(compiler: AsyncCompile, scope: dict[str, Any]) -> None:
    for value in list(scope.values()):
        if isinstance(value, Kernel):
            value.wait()
    _wait(compiler, scope)


def install() -> None:
    AsyncCompile.cpp_pybinding = _request  # type: ignore[method-assign]
    AsyncCompile.wait = _wait_for  # type: ignore[method-assign]


@contextlib.contextmanager
def not_installed() -> Iterator[None]:
    """Inductor as it is, for tests of the waits for its compilers."""
    AsyncCompile.cpp_pybinding, AsyncCompile.wait = _compile_one, _wait  # type: ignore[method-assign]
    yield
    install()
