"""The host memory that is available, and the error raised when it does not suffice."""

from __future__ import annotations

from pathlib import Path


class HostMemoryError(MemoryError):
    """A `MemoryError`: host memory or disk space cannot be allocated, or not be pinned.

    The message names the size and says what to do.
    """


def available_memory() -> int | None:
    """Return the bytes of host memory that can still be allocated, or None where that is unknown (not Linux)."""
    found = [_meminfo("MemAvailable"), *_cgroup_free_bytes()]
    known = [size for size in found if size is not None]
    return min(known) if known else None


def _meminfo(name: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    sizes = (line.split() for line in lines if line.startswith(f"{name}:"))
    return next((int(size[1]) * 1024 for size in sizes), None)


def _cgroup_free_bytes() -> list[int]:
    """Return the bytes left under the limits of control groups v1 and v2. Cached files count as free."""
    free = []
    for folder, limit, used in (
        (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            available = int((folder / limit).read_text()) - int((folder / used).read_text())
            counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        free.append(available + int(counts.get("inactive_file", 0)) + int(counts.get("active_file", 0)))
    return free
