"""Where the registry's files lie: content-addressed, verified when read, in a folder or an object store.

Start reading at `blobs.py`. May import errors and the manifest's file entries; knows no catalogue.
"""

from experts.registry.blobs.blobs import Blobs
from experts.registry.blobs.files import writable
from experts.registry.blobs.store import Stored

__all__ = ["Blobs", "Stored", "writable"]
