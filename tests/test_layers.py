"""Who may import whom, read off the source; and no trace of the machine it was written on."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("passes", "mom_compile")
# The one file that may touch them, so that a new PyTorch is one file to look at.
PRIVATE_HOME = "mom_compile.torch_compat"
# Half-public: passes work on symbolic shapes and trace graphs with these.
ALLOWED_IN_PASSES = ("torch.fx.experimental",)


def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def _is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def _walk(node: ast.AST, at_import_time: bool) -> Iterator[ast.AST]:
    """Every node; with `at_import_time`, none inside functions or `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if at_import_time and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if at_import_time and isinstance(child, ast.If) and _is_type_checking(child.test):
            continue
        yield child
        yield from _walk(child, at_import_time)


def imports(module: str, *, at_import_time: bool = False) -> set[str]:
    """Dotted names a module imports; `from a import b` counts as `a` and, where it is a module, `a.b`."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names: set[str] = set()
    for node in _walk(ast.parse(path.read_text(), str(path)), at_import_time):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base]).rstrip(".")
            names.add(base)
            # Of our own names only modules count; of torch's, any (`from torch import _dynamo`).
            ours = base.split(".")[0] in PACKAGES
            names |= {f"{base}.{a.name}" for a in node.names if not ours or f"{base}.{a.name}" in MODULES}
    return names


def under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def private_torch_uses(module: str) -> set[str]:
    """`torch._x` by import or by attribute."""
    uses = {name for name in imports(module) if name.startswith("torch.") and "._" in name}
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            owner = ast.unparse(node.value)
            if under(owner, "torch") and not under(owner, "torch.ops"):
                uses.add(f"{owner}.{node.attr}")
    return uses


@pytest.mark.parametrize("module", [name for name in MODULES if under(name, "passes")])
def test_passes_stand_alone(module: str) -> None:
    allowed = {"torch", "sympy", "networkx", "passes"}
    for name in imports(module):
        assert not under(name, "mom_compile"), f"{module} imports {name}"
        outside = name.split(".")[0]
        assert outside in allowed or outside in _standard_library(), f"{module} imports {name}"


def _standard_library() -> frozenset[str]:
    import sys

    return sys.stdlib_module_names


@pytest.mark.parametrize("module", [name for name in MODULES if under(name, "passes")])
def test_passes_use_public_torch(module: str) -> None:
    uses = {use for use in private_torch_uses(module) if not use.startswith(ALLOWED_IN_PASSES)}
    assert not uses


@pytest.mark.parametrize("module", [name for name in MODULES if under(name, "mom_compile")])
def test_private_torch_lives_in_one_file(module: str) -> None:
    if module != PRIVATE_HOME:
        assert not private_torch_uses(module), f"move to {PRIVATE_HOME.replace('.', '/')}.py"


@pytest.mark.parametrize(
    ("lower", "upper"),
    [
        ("mom_compile.lowering", "mom_compile.backend"),
        ("mom_compile.lowering", "mom_compile.cli"),
        ("mom_compile.runtime", "mom_compile.backend"),
        ("mom_compile.runtime", "mom_compile.cli"),
        ("mom_compile.runtime", "mom_compile.lowering"),
        ("mom_compile.memory", "mom_compile.backend"),
        ("mom_compile.memory", "mom_compile.cli"),
    ],
)
def test_lower_layers_do_not_know_upper_ones(lower: str, upper: str) -> None:
    wrong = [
        f"{module} imports {name}"
        for module in MODULES
        if under(module, lower)
        for name in imports(module)
        if under(name, upper)
    ]
    assert not wrong


def test_no_import_cycles() -> None:
    graph = nx.DiGraph()
    for module in MODULES:
        for name in imports(module, at_import_time=True):
            # A package whose `__init__` gathers its own modules is no cycle with them.
            if name in MODULES and not under(module, name):
                graph.add_edge(module, name)
    cycles = [c for c in nx.strongly_connected_components(graph) if len(c) > 1]
    assert not cycles


def test_no_machine_paths() -> None:
    """Neither where this checkout stands nor anybody's home."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    # A checkout in a folder as common as /src says nothing about where it was written.
    traces = [str(trace) for trace in (ROOT, Path.home()) if len(trace.parts) > 2]
    wrong = []
    for name in filter(None, listing.stdout.split("\0")):
        path = ROOT / name
        if not path.is_file():
            continue
        text = path.read_bytes().decode("utf-8", errors="ignore")
        wrong += [f"{name}: {trace}" for trace in traces if trace in text]
    assert not wrong
