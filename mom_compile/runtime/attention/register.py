"""Kernels of `mom::attention`, registered for CPU and CUDA when this module is imported.

They replace the reference of `mom_passes.ops.attention` under the same name; other devices keep the reference.
The CUDA kernel has not yet been run on a GPU.
"""

from __future__ import annotations

import torch

from mom_compile.runtime.attention.cpu import attention_cpu
from mom_compile.runtime.attention.cuda import attention_cuda

LIBRARY = torch.library.Library("mom", "IMPL")
LIBRARY.impl("attention", attention_cpu, "CPU")
LIBRARY.impl("attention", attention_cuda, "CUDA")
