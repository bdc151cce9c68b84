"""Types of models compiled for real, with Inductor's code, against eager mode: `make sweep` runs all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.architectures_worker import BOUND_FLOAT32, Caller, NoState, Subject, build, difference
from benchmarks.small_configs import SMALL

#: No mini-sequence and no scan's chunk divides these lengths.
TOKENS = (203, 2011)
OPTIONS = {"mini_seq_len": 64, "strict": True}
SCALE = replace(SMALL, positions=4096)


def compiled_differences(subject: Subject, lengths: Sequence[int] = TOKENS) -> dict[str, float]:
    """By how much the logits of a compiled float32 model differ from eager mode's, relative to the largest logit.

    Nothing runs node by node here. Each length has a prefill with a cache, and a decode step where the model keeps a
    state. What differs by more than `BOUND_FLOAT32` is compared with stock Inductor's result, too: the smaller
    difference counts. Raises `NotCompiled` for a piece that would run eagerly.
    """
    model = build(subject, SCALE, torch.float32)
    wanted, found = (compiled_logits(model, backend, lengths) for backend in (None, "mom"))
    apart = {use: difference(found[use], logits) for use, logits in wanted.items()}
    if max(apart.values()) > BOUND_FLOAT32:
        stock = compiled_logits(model, "inductor", lengths)
        apart = {use: min(apart[use], difference(found[use], stock[use])) for use in apart}
    return apart


def compiled_logits(model: Any, backend: str | None, lengths: Sequence[int]) -> dict[str, torch.Tensor]:
    """Logits of a prefill of each length and of the decode step after it, by a backend; `None` for eager mode."""
    caller = Caller(model, backend, options=OPTIONS)
    caller.compile()
    logits: dict[str, torch.Tensor] = {}
    for tokens in lengths:
        one = replace(caller, tokens={"prefill": tokens})
        outputs: dict[str, Any] = {}
        with contextlib.suppress(NoState):
            for use in ("prefill", "step"):
                logits[f"{use} of {tokens}"] = one.use(use, outputs).clone()
    return logits
