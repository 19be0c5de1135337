"""Probes, metrics and the version: open to everybody, telling nothing about prompts or answers."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from service.api.backend import Backend
from service.metrics import Metrics

_EXPOSITION: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/plain": {}, "application/openmetrics-text": {}}}
}
"""For the OpenAPI document."""


def server_version() -> str:
    """The installed version; a checkout that was never installed has none."""
    try:
        return version("twinserve")
    except PackageNotFoundError:
        return "0+checkout"


def add_routes(router: APIRouter, backend: Backend, metrics: Metrics) -> None:
    """Put the probes, `GET /metrics` and `GET /version` on `router`."""

    def live() -> JSONResponse:
        if backend.alive:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "engine_dead"}, status_code=503)

    @router.get("/health/live")
    async def health_live() -> Response:
        """200 while the engine lives; after that only a restart helps."""
        return live()

    @router.get("/health")
    @router.get("/health/ready")
    async def health_ready() -> Response:
        """200 while new requests are taken."""
        if backend.alive and not backend.ready:
            return JSONResponse({"status": "draining"}, status_code=503, headers={"Retry-After": "5"})
        return live()

    @router.get("/metrics", response_class=Response, responses=_EXPOSITION)
    async def scrape(request: Request) -> Response:
        """Prometheus' text or OpenMetrics, whichever is asked for."""
        body, content_type = metrics.exposition(request.headers.get("accept", ""))
        return Response(body, headers={"Content-Type": content_type})

    @router.get("/version")
    async def get_version() -> Response:
        """The version of this server."""
        return JSONResponse({"version": server_version()})
