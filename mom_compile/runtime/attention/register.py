"""Kernels of `mom::attention`, registered for CPU and CUDA when this module is imported.

They replace the reference of `mom_passes.ops.attention` under the same name; other devices keep the reference.
The CUDA kernel's tests have passed on an H200 (docs/figures.md).
"""

from __future__ import annotations

import torch

from mom_compile.runtime.attention.cpu import attention_cpu
from mom_compile.runtime.attention.cuda import attention_cuda
from mom_passes.ops.attention import as_operator

LIBRARY = torch.library.Library("mom", "IMPL")
LIBRARY.impl("attention", as_operator(attention_cpu), "CPU")
LIBRARY.impl("attention", as_operator(attention_cuda), "CUDA")
