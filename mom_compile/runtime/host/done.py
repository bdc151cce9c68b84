"""Interfaces to wait for a copy between device and host.

Terms
-----
ticket        One running copy. It keeps both tensors alive until they can no longer be accessed.
wait          Called by the computation before it uses a copy's result, or frees or overwrites its source.
done          The completion of a copy. It keeps nothing alive, so anyone may hold it.
synchronize   Called by the host before it reads or writes rows itself.
"""

from __future__ import annotations

from typing import Protocol


class CopyError(RuntimeError):
    """A copy between device and host failed; its target does not have the data."""


class Done(Protocol):
    def synchronize(self) -> None:
        """Block until the copy is done. Raises `CopyError` if it failed."""

    def finished(self) -> bool:
        """Whether the copy no longer accesses its tensors. Does not block."""


class Ticket(Protocol):
    @property
    def done(self) -> Done: ...

    def wait(self) -> None:
        """Make the computation wait for the copy. Raises `CopyError` if it failed."""

    def release(self) -> None:
        """Like `wait`, when only the source's memory is needed. Errors are left to the reader of the result."""
