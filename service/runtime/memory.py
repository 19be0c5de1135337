"""How much memory this process may still take: of the machine, of its control group, of its device."""

import re
from pathlib import Path

import torch

_MACHINE = Path("/proc/meminfo")
_GROUP = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")


def available_bytes(device: torch.device, *, machine: Path = _MACHINE, groups: Path = _GROUPS) -> int | None:
    """Bytes that can be had now; None where the system does not say.

    Args:
        device: where the weights go; on a CPU what counts is the machine's memory and the group's limit.
        machine, groups: where Linux tells of them.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    known = [amount for amount in (_of_machine(machine), _of_group(groups)) if amount is not None]
    return min(known, default=None)


def _of_machine(path: Path) -> int | None:
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", path.read_text(encoding="ascii"), re.MULTILINE)
    except (OSError, ValueError):
        return None
    return int(found[1]) * 1024 if found else None


def _of_group(root: Path) -> int | None:
    """What the limits of the process's control group, and of those above it, leave; caches can be given up."""
    left: list[int] = []
    for folder in _folders(root):
        limit = _number(folder / "memory.max") or _number(folder / "memory.limit_in_bytes")
        used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes")
        if limit is None or used is None:
            continue
        left.append(limit - used + _cached(folder / "memory.stat"))
    return max(min(left), 0) if left else None


def _folders(root: Path) -> list[Path]:
    """Of the unified hierarchy, from the process's own group up; and the old one's."""
    try:
        lines = _GROUP.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        lines = []
    own = next((line[3:] for line in lines if line.startswith("0::")), "/")
    folder = root / own.lstrip("/")
    chain = [folder, *folder.parents]
    return [each for each in chain if each == root or root in each.parents] + [root / "memory"]


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # not there, or "max"
        return None


def _cached(path: Path) -> int:
    try:
        found = re.search(r"^(?:total_)?inactive_file (\d+)$", path.read_text(encoding="ascii"), re.MULTILINE)
    except (OSError, ValueError):
        return 0
    return int(found[1]) if found else 0
