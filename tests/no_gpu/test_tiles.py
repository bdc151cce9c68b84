"""Our attention kernels, compiled for simulated GPUs and interpreted on the CPU.

TRITON_INTERPRET is read when triton is imported, so interpreted kernels run in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mom_compile import MomWarning
from mom_compile.runtime.attention import tiles
from mom_passes.ops.attention import AttentionCall
from tests.no_gpu.target import A100, B200, H100, Gpu, _usage, triton

ROOT = Path(__file__).resolve().parents[2]
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.bool: "*i1",
            torch.int64: "*i64", torch.int32: "*i32"}  # fmt: skip

#: Registers per thread: an SM has 64 Ki, for programs of 128 threads.
MOST_REGISTERS = 255
#: Bytes of shared memory that a program may have on the smallest of them.
MOST_SHARED = 166_912
MOST_STACK = 128


@pytest.mark.parametrize(
    ("every", "first"), [(17, 0), *(pytest.param(11, part, marks=pytest.mark.slow) for part in range(3))]
)
def test_tiles_match_the_definition(every: int, first: int, tmp_path: Path) -> None:
    """Masks, ranges, segments, windows, caps, sinks and splits, in combination: every 17th of 384 cases has 97% of the
    pairs of values, every 11th 99%."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.no_gpu.interpreted_tiles", str(every), str(first)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    said = done.stdout.splitlines()
    assert said.count("ran") >= 330 // every
    assert not [line for line in said if line != "ran"], done.stdout


def call_of(channels: int, rows: int, dtype: torch.dtype, **more: Any) -> AttentionCall:
    def tensor(heads: int, tokens: int) -> torch.Tensor:
        return torch.empty(2, tokens, heads, channels, device="meta", dtype=dtype).transpose(1, 2)

    call = AttentionCall(tensor(8, rows), tensor(2, 4096), tensor(2, 4096), None, 4096 - rows, True, 0.1, **more)
    return call


def keys() -> torch.Tensor:
    return torch.empty(2, 4096, device="meta", dtype=torch.bool)


RANGES = torch.tensor([[[0, 4096]], [[100, 4096]]])

CALLS: dict[str, AttentionCall] = {
    "capped, a window": call_of(256, 2048, torch.bfloat16, window=1024, softcap=50.0),
    "capped, float32": call_of(128, 2048, torch.float32, softcap=50.0),
    "flags of keys, sinks": call_of(64, 2048, torch.bfloat16, keys=keys(), sinks=torch.empty(8, device="meta")),
    "ranges of keys, capped": call_of(128, 2048, torch.bfloat16, keys=keys(), softcap=50.0, spans=RANGES),
    "a decode step": call_of(128, 1, torch.bfloat16, keys=keys()),
}


def type_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def compiled(kernel: Any, given: list[Any], constants: dict[str, Any], gpu: Gpu, **options: int) -> Any:
    names = kernel.arg_names
    signature = {name: type_of(value) for name, value in zip(names, given, strict=False)}
    signature |= dict.fromkeys(constants, "constexpr")
    assert list(signature) == names
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", gpu.capability, gpu.warp_size), options=options)


@pytest.mark.parametrize("gpu", [A100, H100, B200], ids=lambda gpu: f"sm{gpu.capability}")
@pytest.mark.parametrize("name", CALLS)
def test_tiles_compile_for_gpus(name: str, gpu: Gpu) -> None:
    from mom_compile.runtime.attention.tile_kernels import attend, combine

    call, splits = CALLS[name], 8 if CALLS[name].rows == 1 else 1
    out = call.output()
    parts = torch.empty(splits, *out.transpose(1, 2).shape, device="meta").transpose(2, 3) if splits > 1 else out
    given, constants = tiles.arguments(call, parts, parts, splits), tiles.constants(call, splits)
    made = [compiled(attend, given, constants, gpu, num_warps=tiles.tile_of(call).warps, num_stages=tiles.STAGES)]
    if splits > 1:
        sizes = [splits, 2, 8, 1, out.shape[-1], *out.stride()[:3]]
        flags = {"HAS_SINKS": False, "SPLITS": splits, "CHANNELS": out.shape[-1]}
        made.append(compiled(combine, [parts, parts, out, out, *sizes], flags, gpu))
    for one in made:
        registers, stack = _usage(one.asm["cubin"])
        assert registers <= MOST_REGISTERS and stack <= MOST_STACK, (registers, stack)
        assert one.metadata.shared <= MOST_SHARED, one.metadata.shared


def test_a_kernel_that_fails_to_launch_is_replaced_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(call: AttentionCall) -> torch.Tensor:
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(tiles, "_launched", fails)
    monkeypatch.setattr(tiles, "REFUSED", {})
    call = AttentionCall(*torch.randn(3, 1, 2, 4, 16).unbind(), None, 0, True, 0.25)
    with pytest.warns(MomWarning, match="other kernels are used instead: RuntimeError: out of resource"):
        assert tiles.attention_in_tiles(call) is None
    assert not tiles.takes_tiles(call), "it is asked before the GPU is looked at"
