"""Replace an attribute of PyTorch while a block runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from mom_compile.torch_compat.dynamo import COMPILING


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set `owner.name` to `value` until the block ends.

    The block holds `COMPILING`, so that two threads never restore the attribute in the wrong order. A thread that
    compiles without the lock sees the replacement meanwhile.
    """
    with COMPILING:
        before = getattr(owner, name)
        setattr(owner, name, value)
        try:
            yield
        finally:
            setattr(owner, name, before)
