"""The end of a copy between device and host, and who waits for it.

Terms
-----
ticket        One copy under way. It keeps both tensors alive until nobody can touch them any more.
wait          What the computation calls before it uses a copy's result, or frees or rewrites its source.
done          The end of a copy, to which anyone may hold on: it keeps nothing alive.
synchronize   What the host calls before it reads or writes rows itself.
"""

from __future__ import annotations

from typing import Protocol


class CopyError(RuntimeError):
    """A copy between device and host failed; what it should have written is not there."""


class Done(Protocol):
    def synchronize(self) -> None:
        """Return when the copy is done. Raises `CopyError` if it failed."""

    def finished(self) -> bool:
        """Whether nobody touches what was copied any more. Waits for nothing."""


class Ticket(Protocol):
    @property
    def done(self) -> Done: ...

    def wait(self) -> None:
        """The computation goes on only when the copy is done. Raises `CopyError` if it failed."""

    def release(self) -> None:
        """Like `wait`, for one who only wants the source's memory: whoever reads the result learns of an error."""
