"""Our own server in a process of its own, on any bundle and with any settings, and what the kernel says of it."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.peers.family import Family
from benchmarks.peers.twinserve import Twinserve
from experts.bundle import Bundle


class OurServer(Twinserve):
    """`twinserve serve` with the settings given and the defaults for all others.

    Args:
        settings: `TWINSERVE_*` variables.
    """

    def __init__(self, bundle: Path, work: Path, settings: Mapping[str, str] | None = None) -> None:
        super().__init__(Family(bundle.parent), work)
        self._bundle = bundle
        self._settings = dict(settings or {})
        self.model = Bundle.open(bundle, verify=False, lazy=True).manifest.name

    @property
    def pid(self) -> int:
        """Of the server's process."""
        assert self._process is not None
        return self._process.pid

    def command(self, port: int) -> list[str]:
        """The command line."""
        return [sys.executable, "-m", "service", "serve", "--bundle", str(self._bundle), "--port", str(port)]

    def environment(self) -> Mapping[str, str]:
        """The settings."""
        return self._settings


def sizes(pid: int, file: str) -> dict[str, int]:
    """Bytes by name, of /proc/PID/`file` (`status` or `smaps_rollup`)."""
    found = {}
    for line in (Path("/proc") / str(pid) / file).read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        parts = value.split()
        if len(parts) == 2 and parts[1] == "kB":
            found[name] = int(parts[0]) * 1024
    return found


def cpu_seconds(pid: int) -> float:
    """Processor time of a process so far."""
    fields = (Path("/proc") / str(pid) / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
