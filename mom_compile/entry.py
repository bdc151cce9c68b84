"""What PyTorch imports where somebody first asks for `backend="mom"`, and nothing else does.

That is the earliest a C++ compiler can begin on what the first graph will wait for: before Dynamo looks at the model.
Where there is an accelerator the model will hardly be on the CPU; one that is begins with its first graph.
"""

from __future__ import annotations

import torch

from mom_compile.backend import mom as mom
from mom_compile.torch_compat.cpp_kernels import start_the_compiler

if not torch.accelerator.device_count():
    start_the_compiler()
