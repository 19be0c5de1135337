"""A running server as its operator's command line sees it: HTTP alone, nothing of the server is imported.

Start at `server.py`; `jobs.py` follows jobs, `sources.py` and `uploads.py` send fine-tunes, `archives.py` unpacks
exports, `tables.py` prints, `console.py` has what all commands share.
"""

from service.remote.server import RefusedError, RemoteError, Server, UnreachableError

__all__ = ["RefusedError", "RemoteError", "Server", "UnreachableError"]
