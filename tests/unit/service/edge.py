"""One request through the whole app over a scripted backend, in this process."""

import asyncio
from pathlib import Path
from typing import Any, cast

import httpx
from prometheus_client import CollectorRegistry

from experts.bundle import Bundle
from service.api.app import create_app
from service.metrics import Metrics
from service.registrar import LiveExperts, Registrar
from service.settings import Settings
from tests.unit.service.backend import ScriptedBackend

BODY = {"model": "family", "prompt": "abc"}


def call(
    backend: ScriptedBackend,
    body: Any,
    path: str = "/v1/completions",
    method: str = "POST",
    headers: dict[str, str] | None = None,
    **settings: Any,
) -> httpx.Response:
    """One request through the whole app, in this process."""
    metrics = Metrics(CollectorRegistry())
    metrics.watch(backend.gauges)
    # /admin is off without a key, so that its registrar never works here.
    registrar = Registrar(cast(LiveExperts, backend), cast(Bundle, None), None)
    app = create_app(backend, Settings(bundle=Path("none"), **settings), metrics, registrar)

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://edge") as client:
            return await client.request(method, path, json=body, headers=headers)

    return asyncio.run(send())


def events(answer: httpx.Response) -> list[str]:
    return [part.removeprefix("data: ") for part in answer.text.split("\n\n") if part]
