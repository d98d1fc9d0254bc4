"""How much memory a benchmark may take."""

from __future__ import annotations

from pathlib import Path

import torch


def available_memory(device: str = "cpu") -> int:
    """Bytes that can be allocated: free on a GPU (what torch caches included), without swapping on a CPU, within this
    process's control group. Without a figure, a cautious 4 GB."""
    if torch.device(device).type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 4 * 10**9
    return min(free, _control_group_memory())


def _control_group_memory() -> float:
    """What the limit of a container leaves; infinite without one."""
    folder = Path("/sys/fs/cgroup")
    try:
        used = int((folder / "memory.current").read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int((folder / "memory.max").read_text()) - used + int(statistics["inactive_file"])  # of the page cache, given back on demand
    except (OSError, ValueError, KeyError):  # no control group, or one whose limit is "max"
        return float("inf")
