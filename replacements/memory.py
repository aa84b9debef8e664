"""How much memory there is, in bytes."""

import os
from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")


def free_memory(device: str | torch.device = "cpu") -> int:
    """Bytes that can still be had on a device: what the machine has available, and a container's limit leaves."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")] if hasattr(os, "sysconf") else []
    if (available := _from_meminfo()) is not None:
        found = [available]
    if (left := _from_cgroup()) is not None:
        found.append(left)
    return min(found, default=1 << 33)


def _from_meminfo() -> int | None:
    """What Linux would give without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _from_cgroup() -> int | None:
    """What is left of the limit of the container that this process runs in."""
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="utf-8").strip()
        used = int((_CGROUP / "memory.current").read_text(encoding="utf-8"))
        statistics = (_CGROUP / "memory.stat").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return None
    if not limit.isdigit():
        return None
    files = sum(int(line.split()[1]) for line in statistics if line.startswith("inactive_file "))
    return max(0, int(limit) - used + files)
