"""What the registry's worker process does: fine-tune → files of an expert and a router, in a folder of their own.

Start reading at `stages.py`; `tasks.py` says what goes to the process and comes back, `entry.py` is the process.
Knows the bundle and the blobs, no catalogue and no server: whoever asks decides what becomes of the files.
"""

from experts.bundle_files import digest as digest_of
from experts.bundle_manifest import FileEntry
from experts.registry.work.limits import is_full
from experts.registry.work.profiles import read_profile, write_profile
from experts.registry.work.scratch import Scratch
from experts.registry.work.tasks import (
    BUNDLE,
    EXPERT,
    ROUTER,
    SOURCE,
    Answer,
    Built,
    BundleTask,
    Checks,
    Failure,
    Limits,
    Message,
    Prepared,
    RegisterTask,
    RemoteSource,
    Routed,
    RouteTask,
    Setup,
    Step,
    StoreAt,
    Stored,
    StoreTask,
    Task,
    entry_script,
)

__all__ = [
    "BUNDLE",
    "EXPERT",
    "ROUTER",
    "SOURCE",
    "Answer",
    "Built",
    "BundleTask",
    "Checks",
    "Failure",
    "FileEntry",
    "Limits",
    "Message",
    "Prepared",
    "RegisterTask",
    "RemoteSource",
    "RouteTask",
    "Routed",
    "Scratch",
    "Setup",
    "Step",
    "StoreAt",
    "StoreTask",
    "Stored",
    "Task",
    "digest_of",
    "entry_script",
    "is_full",
    "read_profile",
    "write_profile",
]
