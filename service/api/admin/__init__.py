"""`/admin`: how operators change what is served. One file a resource; the work is the registrar's.

Start at `experts.py`. `asking.py` reads what these routes have in common out of a request, `telling.py` puts the
registry's records into answers, `waiting.py` waits for jobs.
"""

from fastapi import APIRouter

from service.api.admin import (
    aliases,
    audit,
    bundles,
    experts,
    exports,
    generations,
    jobs,
    registry,
    trials,
    uploads,
)
from service.api.admin.asking import AdminParts

__all__ = ["AdminParts", "add_routes"]


def add_routes(router: APIRouter, parts: AdminParts) -> None:
    """Put every `/admin` route of the registry on `router`."""
    experts.add_routes(router, parts)
    generations.add_routes(router, parts)
    trials.add_routes(router, parts)
    jobs.add_routes(router, parts)
    aliases.add_routes(router, parts)
    audit.add_routes(router, parts)
    bundles.add_routes(router, parts)
    registry.add_routes(router, parts)
    uploads.add_routes(router, parts)
    exports.add_routes(router, parts)
