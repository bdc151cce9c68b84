"""The kernels of `runtime/attention/tiles.py` in Triton's interpreter, on the CPU, against the definition in float64.

Started by `test_tiles` with TRITON_INTERPRET=1 and a number of cases. Prints one line for each error.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace

import torch

from mom_compile.runtime.attention import tiles
from mom_passes.ops.attention import attention_reference
from tests.no_gpu.interpreter import prepare
from tests.test_attention_kernels import TOLERANCE, Case, in_float64

ROWS = ((1, 0), (5, 70), (70, 0), (40, 33))
CONDITIONS = ("", "left padding", "holes", "packed in order")
MASKS = (("bool", ""), ("own dtype", ""), *((None, conditions) for conditions in CONDITIONS))
SPLITS = (1, 3)


def cases() -> list[tuple[Case, int]]:
    """Rows at different positions with masks, windows, caps, sinks and splits in combination."""
    found = []
    choices = itertools.product(ROWS, MASKS, (None, 9), (None, 0.7), (False, True), SPLITS)
    for number, ((rows, start), (mask, conditions), window, cap, sinks, splits) in enumerate(choices):
        dtype = (torch.float32, torch.float16)[number // 3 % 2]
        group = (1, 3)[number // 5 % 2]
        causal = number % 7 > 0
        sizes = (2, 2, group, rows, start + rows, 24, (24, 8)[number % 2], start)
        broadcast = (number % 2 == 0, number % 3 == 0, False, False)
        case = Case(*sizes, causal, window, mask, broadcast, "token-major", dtype, number, conditions)
        found.append((replace(case, sinks=sinks, softcap=cap), splits))
    return found


def main() -> None:
    prepare()
    every, first = int(sys.argv[1]), int(sys.argv[2])
    for case, splits in cases()[first::every]:
        call = case.call()
        tiles.splits_of = lambda programs, call, splits=splits: splits  # type: ignore[misc]
        made, expected = tiles.attention_in_tiles(call).double(), attention_reference(in_float64(call))
        if not torch.allclose(made, expected, atol=TOLERANCE[case.dtype], rtol=TOLERANCE[case.dtype]):
            sys.stdout.write(f"wrong by {(made - expected).abs().max().item()}, {splits} splits: {case}\n")
        sys.stdout.write("ran\n")


if __name__ == "__main__":
    main()
