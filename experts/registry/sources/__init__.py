"""Where an expert may come from: uploads on disk, URLs of an allow-list, and what both are checked for first.

Knows nothing of merging, routing or HTTP servers. Start reading at `names.py` (what a source consists of), then
`inspection.py`; `uploads.py` keeps what clients send, `fetching.py` reads URLs, `signing.py` says who made it.
"""

from experts.registry.sources.fetching import fetch
from experts.registry.sources.inspection import inspect_source, inspect_weights
from experts.registry.sources.names import SIGNATURE_NAME, check_file_name, is_accepted
from experts.registry.sources.policy import FetchPolicy, parse_prefixes
from experts.registry.sources.signing import (
    digest_of_files,
    digest_of_source,
    new_keys,
    read_keys,
    sign,
    signature_beside,
    verify,
)
from experts.registry.sources.upload import Upload, UploadLimits, read_files, write_files
from experts.registry.sources.uploads import UploadStore
from experts.registry.sources.writer import FileWriter

__all__ = [
    "SIGNATURE_NAME",
    "FetchPolicy",
    "FileWriter",
    "Upload",
    "UploadLimits",
    "UploadStore",
    "check_file_name",
    "digest_of_files",
    "digest_of_source",
    "fetch",
    "inspect_source",
    "inspect_weights",
    "is_accepted",
    "new_keys",
    "parse_prefixes",
    "read_files",
    "read_keys",
    "sign",
    "signature_beside",
    "verify",
    "write_files",
]
