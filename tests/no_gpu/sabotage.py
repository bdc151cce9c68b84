"""Removes waits from the engine's code, one call at a time.

    for cut in cuts():
        with cut.made():
            ...                     # `cut.text` is no longer called

The expression that a call is made on is still evaluated: `begin().wait()` becomes `begin()`.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType, ModuleType

from mom_compile.runtime import copy_steps, program
from mom_compile.runtime.host import (
    bounce,
    engine,
    engine_cuda,
    holders,
    region,
    store,
    tensor,
    tensor_points,
    weight_bytes,
)
from mom_compile.runtime.host.backings import pinned

#: Modules that wait for copies, or record what others wait for.
MODULES = (
    engine_cuda, bounce, engine, copy_steps, store, region, weight_bytes, holders, pinned, tensor, tensor_points,
    program,
)  # fmt: skip
#: Methods and functions that wait, or record what must be waited for. `settled` returns rows that it has waited for.
WAITS = {
    "wait", "wait_event", "record", "synchronize", "release", "settle", "settled", "abandon", "finish", "_let_leave",
    "complete",
}  # fmt: skip


@dataclass(frozen=True)
class Cut:
    module: ModuleType
    #: Qualified name of the function or method.
    function: str
    #: Number of the call within the module.
    number: int
    text: str

    def __str__(self) -> str:
        return f"{self.module.__name__.rpartition('.')[2]}.{self.function}: {self.text}"

    @contextlib.contextmanager
    def made(self) -> Iterator[None]:
        function = _live(self.module, self.function)
        whole = function.__code__
        tree = _Without(self.number).visit(_parsed(self.module))
        compiled = compile(ast.fix_missing_locations(tree), inspect.getfile(self.module), "exec")
        function.__code__ = next(code for code in _codes(compiled) if code.co_qualname == self.function)
        try:
            yield
        finally:
            function.__code__ = whole


#: Only the CPU's engine of threads has these, not the engine of streams. `tests/test_kv_races.py` covers them.
OF_THREADS = ("ThreadTicket.", "ThreadedEngine.")
#: Calls of these names that are no waits.
NO_WAITS = ("self._lock.release", "self.backing.release", "locked.release")


def cuts() -> list[Cut]:
    found = []
    for module in MODULES:
        calls = _Calls()
        calls.visit(_parsed(module))
        found += [Cut(module, function, number, text) for number, (function, text) in enumerate(calls.found)]
    return [cut for cut in found if not cut.function.startswith(OF_THREADS) and not cut.text.startswith(NO_WAITS)]


def _parsed(module: ModuleType) -> ast.Module:
    return ast.parse(inspect.getsource(module))


def _waits(node: ast.Call) -> bool:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return name in WAITS


class _Calls(ast.NodeVisitor):
    """Finds the calls that wait, each with the function or method that contains it."""

    def __init__(self) -> None:
        self.found: list[tuple[str, str]] = []
        self._names: list[str] = []
        self._depth = 0

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._names.append(node.name)
        self.generic_visit(node)
        self._names.pop()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if self._depth == 0:
            self._names.append(node.name)
        self._depth += 1
        self.generic_visit(node)
        self._depth -= 1
        if self._depth == 0:
            self._names.pop()

    def visit_Call(self, node: ast.Call) -> None:
        if _waits(node):
            self.found.append((".".join(self._names), ast.unparse(node)))
        self.generic_visit(node)


class _Without(ast.NodeTransformer):
    def __init__(self, number: int) -> None:
        self.number, self.seen = number, -1

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if _waits(node):
            self.seen += 1
            if self.seen == self.number:
                return self._rest(node.func)
        return self.generic_visit(node)

    @staticmethod
    def _rest(called: ast.expr) -> ast.expr:
        if not isinstance(called, ast.Attribute):
            return ast.Constant(None)
        return ast.Attribute(called.value, "host", ast.Load()) if called.attr == "settled" else called.value


def _live(module: ModuleType, name: str) -> FunctionType:
    found: object = module
    for part in name.split("."):
        found = vars(found)[part]
    for wrapped in ("fget", "__func__", "__wrapped__"):
        found = getattr(found, wrapped, found)
    assert isinstance(found, FunctionType)
    return found


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _codes(inner)
