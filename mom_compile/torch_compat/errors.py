"""How Dynamo shows an exception of a backend to the user, and what fake tensors raise.

ShortenTraceback    Dynamo wraps an exception of a backend in `BackendCompilerFailed`, which adds advice on reporting
                    bugs. It passes subclasses of `ShortenTraceback` on, without its own frames.
"""

from __future__ import annotations

import inspect

from torch._dynamo.exc import ShortenTraceback
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException


class UserError(ValueError, ShortenTraceback):
    """A `ValueError` that Dynamo passes on to the user: the user's frames, the frame that raised it, and the message.

    Parameters
    ----------
    message
        The whole text. Dynamo appends advice to `args` of exceptions; `str` returns the message without it.
    """

    def __init__(self, message: str) -> None:
        raised_in = inspect.currentframe()
        ShortenTraceback.__init__(self, message, first_useful_frame=raised_in.f_back if raised_in else None)
        self.message = message

    def __str__(self) -> str:
        return self.message


#: What an operator on fake tensors raises if its result depends on data.
NEEDS_DATA = (DataDependentOutputException, DynamicOutputShapeException)
