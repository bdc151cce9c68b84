"""The library `mom::`, whose operators rewritten graphs call.

Each has a fake kernel and a reference. The references run anywhere, so a rewritten graph is always executable; a
runtime registers faster kernels for its devices under the same names.
"""

from __future__ import annotations

import torch

LIBRARY = torch.library.Library("mom", "DEF")
