"""Rows of the shipped shapes on a pretended H200: how much of a prefill is launches, and what the rows hold.

The host's time is `HOST_SECONDS`, the arithmetic `Plan.estimate`'s: estimates both, and so is their share.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

import mom_compile
from mom_compile.memory.device import HOST_SECONDS, OVER_LAUNCHING
from mom_compile.planning.shapes import shapes

DEVICE = "H200"
LENGTHS = (4096, 16_384, 65_536, 147_456)
CAPTURED = 16_384
WAYS = ("mom", "mom-cache")
#: The device's bytes at the peak, weights included, beside those with the fewest rows.
MOST_BYTES = 1.1


@dataclass(frozen=True)
class Known:
    """Where a shape does not keep a bound: launches over the arithmetic, and bytes over the least, at most."""

    launches: float
    bytes: float
    lengths: tuple[int, ...]


#: A layer of Gemma 3 270M has 11 MiB of weights: 4096 tokens are 1.6 ms of arithmetic for all layers, and their
#: launches are 4.5 ms even if each layer is run once, without mini-sequences. The rows for which the device does not
#: wait for its host, 16,896, hold 166 MiB, and the weights are 511 MiB.
#: A layer of Qwen3 30B-A3B computes with 57 million weights for a row: 4096 tokens are not cut.
#: Every layer of GPT-OSS 20B has scores of rows by keys, since sinks are computed with products: 128 rows from 16,384
#: tokens on. The arithmetic of those products is counted for as many keys as are captured, `CAPTURED`.
KNOWN = {
    "Gemma-3-270M": Known(2.8, 1.3, LENGTHS),
    "Qwen3-30B-A3B": Known(0.27, MOST_BYTES, (4096,)),
    "GPT-OSS-20B": Known(2.4, MOST_BYTES, LENGTHS),
}


#: Shapes whose rows have not been compared with these bounds.
NOT_MEASURED = (
    "DeepSeek-V3.2", "Falcon-H1-7B", "Gemma-4-26B-A4B", "Gemma-4-31B", "GLM-5", "GPT-OSS-120B", "Granite-4.0-H-Small",
    "Kimi-Linear-48B-A3B", "LFM2-1.2B", "Nemotron-H-8B", "Qwen3.5-27B", "Qwen3.5-35B-A3B",
)  # fmt: skip


def check(name: str, lengths: tuple[int, ...] = LENGTHS, ways: tuple[str, ...] = WAYS) -> None:
    found = mom_compile.plan(name, seq_len=CAPTURED, dtype="bfloat16", device=DEVICE)
    planner = found._planner
    for way in ways:
        for tokens in lengths:
            known = KNOWN.get(name)
            if known is None or tokens not in known.lengths:
                known = Known(1 / OVER_LAUNCHING, MOST_BYTES, lengths)
            arithmetic = replace(found, seq_len=tokens, way=way).estimate().parts["arithmetic"]
            launches = planner.bodies(way, tokens) * HOST_SECONDS / arithmetic
            over = planner.peak(way, tokens) / planner.peak(way, tokens, fewest=True)
            what = f"{name} {way} {tokens} tokens: launches {launches:.3f} of the arithmetic, {over:.3f} of the bytes"
            assert launches <= known.launches and over <= known.bytes, what


def test_launches_are_a_tenth_of_llama_3_8b_and_its_rows_hold_little() -> None:
    check("Llama-3-8B")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in shapes() if name not in ("Llama-3-8B", *NOT_MEASURED)])
def test_launches_are_a_tenth_of_every_shipped_shape_and_its_rows_hold_little(name: str) -> None:
    check(name)
