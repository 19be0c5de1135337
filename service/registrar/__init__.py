"""Experts come and go while requests run: check, compute in a process of its own, publish on disk, then live.

Between api and runtime: knows no HTTP, and the runtime only through `live.py`. Start at `registrar.py`;
`worker.py` is what runs in the other process, `paths.py` which folders may be read at all.
"""

from service.registrar.checks import Registration
from service.registrar.live import LiveExperts
from service.registrar.registrar import Registered, Registrar

__all__ = ["LiveExperts", "Registered", "Registrar", "Registration"]
