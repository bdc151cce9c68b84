"""Hooks of the documentation site: pages from the repository's root, and a check of the API reference.

`mkdocs build` runs them, and `tests/test_docs.py` calls `faults()` without mkdocs.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent

#: Files of the repository's root that are pages of the site.
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
#: Modules whose exports the API reference has, and the page for each.
MODULES = {"mom_compile": "api/mom_compile.md", "mom_compile.rules": "api/rules.md"}

#: Base classes of exports, whose attributes the reference has, too.
BASES = {"mom_compile.report.record.Record"}

_ROOT_LINK = re.compile(r"\]\((?:docs/)?([^)#:]+\.(?:md|png))(?=[)#])")
_UP_LINK = re.compile(rf"\]\(\.\./((?:\.\./)*)({'|'.join(map(re.escape, PAGES))})(?=[)#])")
_DIRECTIVE = re.compile(r"^::: ([\w.]+)\n((?:    .*\n)*)", re.MULTILINE)
_MEMBERS = re.compile(r"members: \[([^\]]*)\]")
_SECTION = re.compile(r"^(\w[\w ]*)\n-{3,}\n", re.MULTILINE)


# --- mkdocs ---


def on_config(config: Any) -> Any:
    """Stop the build where an export is missing from the reference or lacks a section."""
    from mkdocs.exceptions import PluginError

    found = list(faults())
    if found:
        raise PluginError("API reference:\n  " + "\n  ".join(found))
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of the repository's root."""
    from mkdocs.structure.files import File

    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=root_page(source)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Lead links to files of the repository's root to their pages."""
    return _UP_LINK.sub(lambda match: f"]({match[1]}{PAGES[match[2]]}", markdown)


def root_page(source: str) -> str:
    """The text of a page of the repository's root, with links relative to `docs`."""
    text = (ROOT / source).read_text()
    return _ROOT_LINK.sub(lambda match: f"]({PAGES.get(match[1], match[1])}", text)


# --- the API reference ---


def faults() -> Iterator[str]:
    """Yield what the API reference lacks, one line for each fault."""
    for module_name, page in MODULES.items():
        module = importlib.import_module(module_name)
        listed = directives((DOCS / page).read_text())
        for name in sorted(module.__all__):
            value = getattr(module, name)
            members = next((listed[path] for path in _paths(module_name, name, value) if path in listed), None)
            if members is None:
                yield f"{page} has no `::: {module_name}.{name}`"
                continue
            for fault in _faults_of(value, members):
                yield f"{module_name}.{name}{fault}"
        exported = {path for name in module.__all__ for path in _paths(module_name, name, getattr(module, name))}
        yield from (f"{page}: {path} is not exported" for path in sorted(listed.keys() - exported - BASES))


def directives(page: str) -> dict[str, list[str]]:
    """Return the objects that a page documents, by path, with the members of each that it lists."""
    found = {}
    for path, options in _DIRECTIVE.findall(page + "\n"):
        members = _MEMBERS.search(options)
        found[path] = [name.strip() for name in members[1].split(",")] if members else []
    return found


def _paths(module: str, name: str, value: Any) -> list[str]:
    """Return the paths under which a page may document an export. Some exports share their name with a module."""
    function = inspect.unwrap(value)
    return [f"{module}.{name}", f"{function.__module__}.{function.__qualname__}"]


def _faults_of(value: Any, members: list[str]) -> Iterator[str]:
    if not inspect.isclass(value):
        yield from _function_faults(value, raises=True)
        return
    docs = [inspect.cleandoc(base.__doc__ or "") for base in value.__mro__ if base.__module__ != "builtins"]
    if not value.__dict__.get("__doc__"):
        yield " has no docstring"
    if dataclasses.is_dataclass(value):
        fields = [field.name for field in dataclasses.fields(value) if not field.name.startswith("_")]
        described = [name for doc in docs for name in _names(doc, "Attributes")]
        yield from _differences(fields, described, "Attributes")
    for name in members:
        member = inspect.getattr_static(value, name, None)
        if member is None:
            yield f" has no member {name}"
        elif isinstance(member, property | functools.cached_property):
            yield from (f".{name}{fault}" for fault in _no_docstring(member))
        elif callable(member):
            yield from (f".{name}{fault}" for fault in _function_faults(member, raises=False))


def _function_faults(function: Any, *, raises: bool) -> Iterator[str]:
    yield from _no_docstring(function)
    signature, doc = inspect.signature(function), inspect.getdoc(function) or ""
    names = [name for name in signature.parameters if name != "self"]
    yield from _differences(names, _names(doc, "Parameters"), "Parameters")
    sections = _SECTION.findall(doc)
    gives_nothing = signature.return_annotation in (None, "None")
    wanted = ["Returns"] * (not gives_nothing) + ["Raises"] * (raises and bool(names))
    for section in wanted:
        if section not in sections and not (section == "Returns" and "Yields" in sections):
            yield f" has no section {section}"


def _no_docstring(value: Any) -> Iterator[str]:
    if not (value.__doc__ or "").strip():
        yield " has no docstring"


def _differences(wanted: list[str], found: list[str], section: str) -> Iterator[str]:
    missing, unknown = [n for n in wanted if n not in found], [n for n in found if n not in wanted]
    if missing:
        yield f": section {section} lacks {', '.join(missing)}"
    if unknown:
        yield f": section {section} has {', '.join(unknown)}, which do not exist"


def _names(doc: str, section: str) -> list[str]:
    """Return the names that the sections of that title describe: what stands at the margin of each."""
    parts = _SECTION.split(doc)[1:]
    bodies = [body for title, body in zip(parts[::2], parts[1::2], strict=True) if title == section]
    lines = [line for body in bodies for line in body.splitlines() if line.strip() and not line.startswith(" ")]
    return [name.strip(" *") for line in lines for name in line.partition(" :")[0].split(",")]
