"""The operator library `mom::`.

Every operator has a fake kernel and a reference that runs on any device, so a rewritten graph is always executable. A
runtime registers faster kernels for its devices under the same names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_new_library: Any = torch.library.Library
LIBRARY: Any = _new_library("mom", "DEF")


def define(schema: str) -> Any:
    """Declare an operator and return its overload."""
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    return getattr(torch.ops.mom, schema.partition("(")[0]).default


def implement(operator: Any, reference: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register an operator's reference, for all devices, and its fake kernel."""
    torch.library.register_fake(operator, fake, lib=LIBRARY)
    LIBRARY.impl(operator, reference, "CompositeExplicitAutograd")
