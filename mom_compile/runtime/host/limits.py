"""How much host memory there is to be had, and the error where there is not enough."""

from __future__ import annotations

from pathlib import Path


class HostMemoryError(MemoryError):
    """A `MemoryError`: host memory or disk space cannot be allocated, or not be pinned.

    The message names the size and says what to do.
    """


def available_memory() -> int | None:
    """Bytes of host memory that may still be taken, or None where the machine does not say (not Linux)."""
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
    """What the limits of a container leave, by either version of control groups. Cached files count as free."""
    rooms = []
    for folder, limit, used in (
        (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            room = int((folder / limit).read_text()) - int((folder / used).read_text())
            counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        rooms.append(room + int(counts.get("inactive_file", 0)) + int(counts.get("active_file", 0)))
    return rooms
