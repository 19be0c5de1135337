"""Whether catalogue and blobs agree, mending what does not, and giving up what nobody needs.

Start reading at `checker.py`; `garbage.py` is garbage collection. May import the catalogue, blobs and records.
"""

from experts.registry.verify.checker import verify
from experts.registry.verify.findings import Finding, Findings
from experts.registry.verify.garbage import Collected, collect_garbage

__all__ = ["Collected", "Finding", "Findings", "collect_garbage", "verify"]
