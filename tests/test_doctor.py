"""The doctor finds faults planted by these tests, names remedies, and reports whether the backend can work."""

from __future__ import annotations

import errno
import os
from types import SimpleNamespace

import pytest
import torch

from mom_compile.cli import checks, main
from mom_compile.cli.checks import Finding, State, findings
from mom_compile.cli.doctor import abilities

NAMES = ["Python", "torch", "transformers", "backend", "GPU", "Triton", "C++ compiler", "compile cache", "disk",
         "pinned memory"]  # fmt: skip


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def fits(finding, state, found, remedy=""):
    assert finding.state is state
    assert found in finding.found and remedy in finding.remedy
    assert bool(finding.remedy) == (state is not State.OK)


def test_this_machine_has_everything_for_the_cpu(on_cpu):
    found = findings()
    assert [finding.name for finding in found] == NAMES
    assert not [finding for finding in found if finding.state is State.BROKEN]
    assert all(finding.found for finding in found)


# --- versions ---


@pytest.mark.parametrize(
    ("version", "state"),
    [("2.13.0+cpu", State.OK), ("2.11.0", State.OK), ("2.10.1", State.BROKEN), ("2.99.0", State.LIMITED)],
)
def test_an_old_torch_is_broken_and_a_new_one_unverified(monkeypatch, version, state):
    monkeypatch.setattr(torch, "__version__", version)
    fits(checks.pytorch(), state, version, "" if state is State.OK else "install torch 2.11 to 2.14")


def test_a_missing_transformers_limits_plans_only(monkeypatch):
    monkeypatch.setattr(checks, "_installed", {"transformers": "5.1.0"}.get)
    fits(checks.transformers(), State.LIMITED, "5.1.0, outside the tested range", "install transformers 5.17 to 5.24")
    monkeypatch.setattr(checks, "_installed", {}.get)
    fits(checks.transformers(), State.LIMITED, "not installed", "pip install transformers")


def test_an_uninstalled_package_has_no_backend():
    fits(checks.backend(["inductor", "eager"]), State.BROKEN, 'no backend "mom"', "pip install")
    fits(checks.backend(["inductor", "mom"]), State.OK, "finds")


# --- devices ---


def test_a_cpu_build_of_torch_differs_from_a_missing_gpu(on_cpu, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", None)
    fits(checks.gpu(), State.LIMITED, "built for CPUs only", "PyTorch's CUDA build")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    fits(checks.gpu(), State.LIMITED, "none that PyTorch can use", "nvidia-smi")


@pytest.mark.parametrize(("capability", "state"), [((9, 0), State.OK), ((6, 1), State.LIMITED)])
def test_a_gpu_is_named_and_an_old_one_is_limited(monkeypatch, capability, state):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A Card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3 << 30, 80 << 30))
    fits(checks.gpu(), state, "A Card, 3.0 GiB of 80 GiB free, CUDA 13.0", "" if state is State.OK else "7.0 and later")


def test_triton_is_needed_for_gpus_only(monkeypatch):
    monkeypatch.setattr(checks, "_installed", {}.get)
    fits(checks.triton(has_gpu=True), State.BROKEN, "not installed", "pip install triton")
    fits(checks.triton(has_gpu=False), State.OK, "not needed without a GPU")
    monkeypatch.setattr(checks, "_installed", {"triton": "3.7.1"}.get)
    fits(checks.triton(has_gpu=True), State.OK, "3.7.1")


# --- compilation ---


def planted_compiler(tmp_path, body):
    path = tmp_path / "planted-g++"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return lambda: str(path)


@pytest.mark.parametrize(("has_gpu", "state"), [(False, State.BROKEN), (True, State.LIMITED)])
def test_without_a_compiler_nothing_runs_on_a_cpu(monkeypatch, has_gpu, state):
    def none():
        raise RuntimeError("No working C++ compiler found in ('g++',)\nand more")

    monkeypatch.setattr(checks, "cxx_compiler", none)
    finding = checks.compiler(has_gpu=has_gpu)
    fits(finding, state, "none: No working C++ compiler found in ('g++',)", "apt install g++")
    assert "\n" not in finding.found


def test_a_missing_or_failing_compiler_is_reported(monkeypatch, tmp_path):
    monkeypatch.setattr(checks, "cxx_compiler", lambda: "/no/such/g++")
    fits(checks.compiler(has_gpu=False), State.BROKEN, "/no/such/g++ does not exist", "CXX")
    broken = planted_compiler(tmp_path, "echo 'program.cpp:2:10: fatal error: omp.h: No such file' >&2; exit 1")
    monkeypatch.setattr(checks, "cxx_compiler", broken)
    fits(checks.compiler(has_gpu=False), State.BROKEN, "C++17 with OpenMP: program.cpp:2:10: fatal error: omp.h", "CXX")
    silent = planted_compiler(tmp_path, "exit 3")
    monkeypatch.setattr(checks, "cxx_compiler", silent)
    fits(checks.compiler(has_gpu=False), State.BROKEN, "no message", "CXX")


def test_an_unwritable_cache_folder_is_reported(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    fits(checks.cache_folder(), State.BROKEN, ": Not a directory", "TORCHINDUCTOR_CACHE_DIR")


def test_a_read_only_disk_is_reported(monkeypatch, tmp_path):
    def refuses(**where):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), where["dir"])

    monkeypatch.setattr(checks, "compile_cache_folder", lambda: str(tmp_path))
    monkeypatch.setattr(checks.tempfile, "NamedTemporaryFile", refuses)
    fits(checks.cache_folder(), State.BROKEN, f"cannot write to {tmp_path}: Read-only file", "TORCHINDUCTOR_CACHE")


def test_a_noexec_folder_is_reported(monkeypatch, tmp_path):
    monkeypatch.setattr(checks, "compile_cache_folder", lambda: str(tmp_path))
    fits(checks.cache_folder(), State.OK, str(tmp_path))
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=os.ST_NOEXEC | os.ST_NOSUID))
    fits(checks.cache_folder(), State.BROKEN, "noexec", "TORCHINDUCTOR_CACHE_DIR")


def test_a_full_disk_is_reported(monkeypatch, tmp_path):
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: SimpleNamespace(free=300 << 20))
    fits(checks.disk(tmp_path), State.LIMITED, "300 MiB free", "1.0 GiB is advised")
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: SimpleNamespace(free=300 << 30))
    fits(checks.disk(tmp_path), State.OK, "300 GiB free")


# --- host memory ---


@pytest.fixture
def pins(monkeypatch):
    """Host memory of 16 GiB; records pinned sizes, or raises `refusal`."""
    asked = SimpleNamespace(sizes=[], refusal=None)

    def empty(size, *, dtype, pin_memory):
        asked.sizes.append(size)
        if asked.refusal is not None:
            raise asked.refusal

    monkeypatch.setattr(checks, "available_memory", lambda: 16 << 30)
    monkeypatch.setattr(checks.torch, "empty", empty)
    return asked


def test_without_a_gpu_nothing_is_pinned(pins):
    fits(checks.pinned_memory(has_gpu=False), State.OK, "16 GiB of host memory available; not pinned without a GPU")
    assert not pins.sizes


def test_a_lock_limit_below_host_memory_is_reported(pins, monkeypatch):
    monkeypatch.setattr(checks, "locked_limit", lambda: 8 << 20)
    fits(checks.pinned_memory(has_gpu=True), State.LIMITED, "RLIMIT_MEMLOCK is 8.0 MiB", "ulimit -l unlimited")
    monkeypatch.setattr(checks, "locked_limit", lambda: None)
    fits(checks.pinned_memory(has_gpu=True), State.OK, "16 GiB of host memory")
    assert pins.sizes == [64 << 20] * 2


def test_a_failure_to_pin_is_reported(pins):
    pins.refusal = RuntimeError("CUDA error: out of memory\nadvice")
    finding = checks.pinned_memory(has_gpu=True)
    fits(finding, State.LIMITED, "cannot pin 64 MiB: CUDA error: out of memory", "kv_offload=False")
    assert "advice" not in finding.found


def test_the_lock_limit_is_that_of_the_process():
    limit = checks.locked_limit()
    assert limit is None or limit > 0


# --- all checks ---


def test_a_failing_check_does_not_stop_others(monkeypatch, on_cpu):
    def fails(folder):
        raise PermissionError("planted")

    monkeypatch.setattr(checks.shutil, "disk_usage", fails)
    found = {finding.name: finding for finding in findings()}
    assert list(found) == NAMES
    fits(found["disk"], State.LIMITED, "the check failed: PermissionError: planted", "report")


def all_fine(**others):
    return [others.get(name.replace(" ", "_").replace("+", "p"), Finding(name, State.OK, "there")) for name in NAMES]


def works(found):
    return {ability.what.split(",")[0]: not ability.lacking for ability in abilities(found)}


@pytest.mark.parametrize(
    ("missing", "lost"),
    [
        ({}, set()),
        ({"GPU": State.LIMITED}, {"prefill and decode on the GPU", "cache and weights on the host"}),
        ({"Cpp_compiler": State.BROKEN}, {"prefill and decode on the CPU"}),
        ({"pinned_memory": State.LIMITED}, {"cache and weights on the host"}),
        ({"torch": State.LIMITED}, set()),
        ({"torch": State.BROKEN}, {"prefill and decode on the CPU", "prefill and decode on the GPU",
                                   "cache and weights on the host"}),
    ],
)  # fmt: skip
def test_abilities_follow_from_findings(missing, lost):
    names = {"Cpp_compiler": "C++ compiler"}
    planted = {
        key: Finding(names.get(key, key.replace("_", " ")), state, "planted", "mend") for key, state in missing.items()
    }
    assert {what for what, able in works(all_fine(**planted)).items() if not able} == lost
    for ability in abilities(all_fine(**planted)):
        assert not ability.lacking or "planted" in ability.lacking


@pytest.mark.parametrize("broken", [False, True])
def test_the_exit_code_is_1_if_the_backend_cannot_work(monkeypatch, capsys, broken):
    planted = Finding("torch", State.BROKEN, "1.0, outside the tested range", "install torch 2.11 to 2.14")
    found = all_fine(torch=planted) if broken else all_fine(GPU=Finding("GPU", State.LIMITED, "none", "get one"))
    monkeypatch.setattr("mom_compile.cli.doctor.findings", lambda: found)
    with pytest.raises(SystemExit) as ended:
        main(["doctor"])
    out, err = capsys.readouterr()
    assert ended.value.code == int(broken) and not err and "\x1b" not in out
    remedy = "install torch 2.11 to 2.14" if broken else "get one"
    assert remedy in out and ("works" in out)
