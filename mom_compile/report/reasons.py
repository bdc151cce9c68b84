"""Reasons for leaving a graph to stock Inductor that other code distinguishes. Further reasons are plain texts."""

from __future__ import annotations

import enum


class Reason(enum.StrEnum):
    """Compare members with `is`, not by their text."""

    ASKED_FOR = "scope='none' asks for stock Inductor"
    NEEDS_GRADIENTS = "the graph needs gradients (call it under torch.no_grad() or torch.inference_mode())"
    AHEAD_OF_TIME = "ahead-of-time and C++-wrapper compilation are stock Inductor's"
    ONE_TOKEN = "decode step: one token, nothing to cut"
