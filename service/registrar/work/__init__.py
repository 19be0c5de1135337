"""Runs the registry's jobs: one at a time over all replicas, in a process that gives way to everything else.

Start at `supervisor.py`; `registering.py`, `reprofiling.py` and `rebuilding.py` are what jobs do, `process.py` is
the worker's process as seen from here, `experts.registry.work` from inside.
"""

from service.registrar.work.options import WorkOptions
from service.registrar.work.supervisor import Supervisor

__all__ = ["Supervisor", "WorkOptions"]
