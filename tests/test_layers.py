"""Who may import whom, read off the source; and no trace of the machine it was written on."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).resolve().parent.parent
#: Package -> the folder that is on the path for it.
PACKAGES = {"mom_passes": ROOT / "passes", "mom_compile": ROOT}
#: Rooms from the ground up: each may import those before it, and its own modules.
ROOMS = {
    "mom_passes": (
        "torch_compat source_lines errors",
        "ops", "graph", "rules", "attention", "tokens", "loops", "host", "program", "verify",
    ),
    "mom_compile": (
        "torch_compat rules scans", "substitution", "packed_attention", "substitutes", "versions",
        "notices progress quantities", "runtime",
        "arguments divided timeline config report pipeline stand_ins cache_key skip", "memory trial",
        "lowering padding packings", "capture compiled", "backend", "compile entry scores weights", "planning",
        "explain", "cli",
    ),
}  # fmt: skip
#: The only places that may use private APIs of PyTorch: a new PyTorch release changes no other file.
PRIVATE_HOMES = ("mom_passes.torch_compat", "mom_compile.torch_compat")
#: What `mom_compile.runtime.host` may import besides torch and the standard library, so that it can be read, and used,
#: without the passes and the compiler.
HOST = "mom_compile.runtime.host"
NEEDED_BY_HOST = ("mom_compile.notices", "mom_compile.torch_compat.tensors", "mom_compile.versions")
#: What is not public of symbolic numbers, operators and fake tensors, though it has no underscore in front.
PRIVATE_ATTRIBUTES = {
    "create_symboolnode", "create_symfloatnode", "create_symintnode", "fake_mode", "guards", "has_hint",
    "overloadpacket", "shape_env", "suppress_guards", "var_to_range",
}  # fmt: skip


def modules() -> dict[str, Path]:
    found = {}
    for package, source in PACKAGES.items():
        for path in sorted((source / package).rglob("*.py")):
            parts = path.relative_to(source).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(module: str) -> set[str]:
    """Dotted names a module imports, inside functions too; `from a import b` counts as `a` and, where it is a module,
    `a.b`."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
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
    """Private names of PyTorch: `torch._x` by import or by attribute, and attributes of what it hands out."""
    uses = {name for name in imports(module) if name.startswith("torch.") and "._" in name}
    uses |= {name for name in imports(module) if name.startswith("torch.fx.experimental")}
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Constant) and node.value == "_schema":
            uses.add("_schema")
        if not isinstance(node, ast.Attribute):
            continue
        owner = ast.unparse(node.value)
        private = node.attr.startswith("_") and not node.attr.startswith("__")
        if private and under(owner, "torch") and not under(owner, "torch.ops"):
            uses.add(f"{owner}.{node.attr}")
        number = node.attr in ("expr", "hint") and owner.endswith(".node")
        if number or node.attr in PRIVATE_ATTRIBUTES or node.attr == "_schema":
            uses.add(f"{owner}.{node.attr}")
    return uses


def room(module: str) -> str:
    """`mom_passes.graph` of `mom_passes.graph.edit`; a package's own `__init__` stands above all its rooms."""
    return ".".join(module.split(".")[:2])


def level(name: str) -> tuple[int, int]:
    """Package and place in it, from the ground up."""
    package, _, inner = room(name).partition(".")
    places = [i for i, rooms in enumerate(ROOMS[package]) if inner in rooms.split()]
    assert places or not inner, f"{name} stands in no room of ROOMS"
    return list(PACKAGES).index(package), places[0] if places else len(ROOMS[package])


@pytest.mark.parametrize("module", MODULES)
def test_rooms_stand_on_those_below(module: str) -> None:
    """Who imports whom is read off the source, imports inside functions included."""
    ours = [name for name in imports(module) if name.split(".")[0] in PACKAGES and room(name) != room(module)]
    above = [name for name in ours if "." in name and level(name) > level(module)]
    assert not above, f"{module} imports {above}"


@pytest.mark.parametrize("name", [f"{p}.{room}" for p, rooms in ROOMS.items() for room in " ".join(rooms).split()])
def test_every_room_is_there(name: str) -> None:
    assert name in MODULES


@pytest.mark.parametrize("module", [name for name in MODULES if under(name, "mom_passes")])
def test_passes_stand_alone(module: str) -> None:
    """No runtime and no compiler: an FX library."""
    allowed = {"torch", "sympy", "networkx", "mom_passes", *sys.stdlib_module_names}
    wrong = [name for name in imports(module) if name.split(".")[0] not in allowed or under(name, "torch._inductor")]
    assert not wrong


@pytest.mark.parametrize("module", MODULES)
def test_private_torch_lives_in_its_homes(module: str) -> None:
    if not any(under(module, home) for home in PRIVATE_HOMES):
        assert not private_torch_uses(module), f"move to {' or '.join(PRIVATE_HOMES)}"


def private_files() -> list[str]:
    files = [name for name in MODULES if any(under(name, home) for home in PRIVATE_HOMES)]
    return [name for name in files if name not in ("mom_compile.torch_compat", "mom_compile.torch_compat.scoped")]


@pytest.mark.parametrize("module", private_files())
def test_what_is_private_is_seen_and_explained(module: str) -> None:
    """These files would not pass the test above, and their docstrings say what the private names stand for."""
    assert private_torch_uses(module)
    assert len((ast.get_docstring(ast.parse(MODULES[module].read_text())) or "").splitlines()) > 2


@pytest.mark.parametrize("module", [name for name in MODULES if under(name, HOST) or name in NEEDED_BY_HOST])
def test_the_host_package_stands_alone(module: str) -> None:
    """Neither it nor what it needs imports the passes, Dynamo, Inductor or another part of this package."""
    wrong = [
        name
        for name in imports(module)
        if name.split(".")[0] not in {"torch", *sys.stdlib_module_names}
        and not under(name, HOST)
        and name not in NEEDED_BY_HOST
    ]
    compilers = [name for name in imports(module) if under(name, "torch._dynamo") or under(name, "torch._inductor")]
    assert not wrong and not compilers


def test_no_import_cycles() -> None:
    graph = nx.DiGraph()
    for module in MODULES:
        for name in imports(module):
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
