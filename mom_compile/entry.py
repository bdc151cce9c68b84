"""The entry point of `backend="mom"`, imported by PyTorch on first use of that name.

That is the earliest time to start a C++ compiler on code that the first graph needs, before Dynamo traces the model.
With an accelerator, models are seldom on the CPU; the compiler then starts with the first CPU graph.
"""

from __future__ import annotations

import torch

from mom_compile.backend import mom as mom
from mom_compile.torch_compat.cpp_kernels import start_the_compiler

if not torch.accelerator.device_count():
    start_the_compiler()
