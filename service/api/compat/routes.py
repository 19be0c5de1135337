"""All routes of other servers, put on one router."""

from typing import Any

from fastapi import APIRouter

from service.api.admin import AdminParts
from service.api.compat import llamacpp, lorax, vllm
from service.api.parts import Parts


def add_routes(router: APIRouter, parts: Parts, operators: AdminParts) -> None:
    """Put them on `router`, whose route class they share."""
    base: Any = router.route_class
    vllm.add_routes(router, operators)
    llamacpp.add_routes(router, parts, base)
    lorax.add_routes(router, parts, base)
