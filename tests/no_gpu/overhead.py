"""Host time of a loop's body on CUDA: the Python part, with launches replaced by stubs.

    TRITON_INTERPRET=1 python -m tests.no_gpu.overhead

The bodies of a small Llama are compiled for `cuda:0` and run by the real loop; kernels, products and attention do
nothing. The time excludes launches and PyTorch's dispatch of products. It is `HOST_SECONDS` of
`mom_compile.memory.device`.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from torch._inductor.select_algorithm import extern_kernels

from mom_compile.runtime.loop import CompiledLoop
from mom_passes.ops.attention import AttentionCall, as_operator
from tests.models import ids, small_model
from tests.no_gpu import interpreter
from tests.no_gpu.interpreted import _without_a_device, compiled_for_cuda

#: Tokens of a mini-sequence, and the number of tokens.
ROWS, ITERATIONS = 32, 64


def nothing(*_: Any, **__: Any) -> None:
    """Replaces a launch."""


def the_layers_loop(profile: bool = False) -> dict[str, Any]:
    calls: list[tuple[CompiledLoop, list[Any]]] = []
    run_loop = CompiledLoop.__call__

    def remember(loop: CompiledLoop, arguments: list[Any]) -> Any:
        calls.append((loop, list(arguments)))
        return run_loop(loop, arguments)

    compiled = compiled_for_cuda(small_model("Llama"), ROWS)
    library = torch.library.Library("mom", "IMPL")
    with (
        torch.no_grad(),
        mock.patch.object(CachingAutotuner, "run", nothing),
        mock.patch.object(extern_kernels, "mm", nothing),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # of a kernel that is replaced
        library.impl("attention", as_operator(AttentionCall.output), "CPU", allow_override=True)
        library.impl("product_into", nothing, "CPU", allow_override=True)
        with mock.patch.object(CompiledLoop, "__call__", remember):
            compiled(input_ids=ids(1, ROWS * ITERATIONS), use_cache=False)
        loop, arguments = calls[1]  # the first loop has only the embedding and the first keys

        def run() -> None:
            run_loop(loop, list(arguments))

        with _without_a_device():
            run()
            if profile:
                _profiled(run)
            seconds = [_timed(run) for _ in range(41)]
    return {"us_per_body": statistics.median(seconds) / ITERATIONS * 1e6, "least": min(seconds) / ITERATIONS * 1e6}


def _timed(run: Callable[[], None]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _profiled(run: Callable[[], None]) -> None:
    profiler = cProfile.Profile()
    with profiler:
        for _ in range(20):
            run()
    pstats.Stats(profiler, stream=sys.stderr).sort_stats("tottime").print_stats(25)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--profile", action="store_true")
    interpreter.prepare()
    sys.stdout.write(json.dumps(the_layers_loop(parser.parse_args().profile)) + "\n")


if __name__ == "__main__":
    main()
