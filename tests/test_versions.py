"""The tested range of versions: all places that state it agree, and versions outside of it warn once."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import mom_compile.notices as notices
from mom_compile import MomWarning
from mom_compile.versions import TESTED, running, untested
from tests.models import TinyDecoder, ids

ROOT = Path(__file__).parent.parent
INSIDE = {"torch": "2.13.0+cpu", "transformers": "5.23.0", "Python": "3.12.1"}


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("torch", "2.11.0"), ("torch", "2.14.1+cu130"), ("torch", "2.14.0a0+gitabc"),
        ("transformers", "5.17.0"), ("transformers", "5.24.3"), ("Python", "3.11.0"), ("Python", "3.13.9"),
    ],
)  # fmt: skip
def test_versions_within_the_tested_range_do_not_warn(name, version):
    assert untested({**INSIDE, name: version}) is None


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("torch", "2.10.1"), ("torch", "2.15.0.dev20261101+cpu"), ("torch", "3.0"), ("transformers", "4.57.1"),
        ("transformers", "5.25.0"), ("Python", "3.14.0rc2"), ("transformers", "unknown"),
    ],
)  # fmt: skip
def test_a_version_outside_the_range_is_named(name, version):
    text = untested({**INSIDE, name: version})
    assert text is not None
    assert f"results with {name} {version} are unverified" in text
    assert "torch 2.11 to 2.14, transformers 5.17 to 5.24, Python 3.11 to 3.13" in text


def test_all_versions_outside_the_range_are_named():
    text = untested({"torch": "2.15.0", "Python": "3.14.0"})
    assert text is not None
    assert "with torch 2.15.0 and Python 3.14.0 are" in text


def test_transformers_counts_only_if_imported(monkeypatch):
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    assert set(running()) == {"torch", "Python"}
    assert "transformers" not in sys.modules


@pytest.mark.usefixtures("eager_pieces")
def test_the_first_compilation_warns_once_per_process(monkeypatch):
    notices.warn_of_versions.cache_clear()
    monkeypatch.setattr(torch, "__version__", "2.15.0")
    first, second = (torch.compile(TinyDecoder(1).eval(), backend="mom", options={"mini_seq_len": 8}) for _ in range(2))
    with torch.no_grad():
        with pytest.warns(MomWarning, match=r"torch 2\.15\.0 are unverified"):
            first(ids(1, 20))
        torch._dynamo.reset()
        second(ids(1, 20))  # a warning would be an error


def test_the_package_metadata_has_the_lower_bounds_only():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert project["requires-python"] == f">={TESTED['Python'][0]}"
    assert f"torch>={TESTED['torch'][0]}" in project["dependencies"]
    for extra in ("test", "demo", "bench"):
        assert f"transformers>={TESTED['transformers'][0]}" in extras[extra]


def test_the_pinned_versions_are_in_the_range():
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert untested({"torch": pins["torch"], "transformers": pins["transformers"]}) is None


@pytest.mark.parametrize("place", ["README.md", "mom_compile/torch_compat/__init__.py"])
def test_the_documentation_states_the_range(place):
    text = (ROOT / place).read_text()
    assert f"torch {TESTED['torch'][0]} to {TESTED['torch'][1]}" in text
    if place == "README.md":
        assert "transformers {} to {}, Python {} to {}".format(*TESTED["transformers"], *TESTED["Python"]) in text
