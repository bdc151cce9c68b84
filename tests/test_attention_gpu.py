"""`mom::attention` on CUDA against its definition: what is said of keys, by every kernel it may take."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mom_compile.runtime.attention.register  # noqa: F401  registers the kernels
from mom_passes.ops.attention import attention_reference
from tests.test_attention_kernels import CONDITIONS, OP, TOLERANCE, Case

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("conditions", ["", *CONDITIONS])
def test_what_is_said_of_keys(conditions: str, dtype: torch.dtype, window: int | None) -> None:
    case = Case(3, 2, 2, 50, 200, 64, 64, 100, True, window, None, (False,) * 4, "head-major", dtype, 0, conditions)
    arguments = case.arguments()
    result = OP(*(_on_device(a, i) for i, a in enumerate(arguments)))
    wide = tuple(a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in arguments)
    assert result.transpose(1, 2).is_contiguous()
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(result.double().cpu(), attention_reference(*wide), atol=tolerance, rtol=tolerance)


def _on_device(argument: Any, position: int) -> Any:
    """What `mom.spans` has found, the last argument, stays on the host."""
    return argument.cuda() if torch.is_tensor(argument) and position < 11 else argument
