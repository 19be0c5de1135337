"""One request through the whole app over a scripted backend, in this process."""

import asyncio
from pathlib import Path
from typing import Any, cast

import httpx
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from service.api.app import create_app
from service.metrics import Metrics
from service.registrar import Registrar
from service.settings import Settings
from tests.unit.service.backend import ScriptedBackend, ScriptedNames

BODY = {"model": "family", "prompt": "abc"}


def call(
    backend: ScriptedBackend,
    body: Any,
    path: str = "/v1/completions",
    method: str = "POST",
    headers: dict[str, str] | None = None,
    names: ScriptedNames | None = None,
    **settings: Any,
) -> httpx.Response:
    """One request through the whole app, in this process."""
    metrics = Metrics(CollectorRegistry())
    metrics.watch(backend.gauges)
    app = scripted_app(backend, metrics, names, **settings)

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://edge") as client:
            return await client.request(method, path, json=body, headers=headers)

    return asyncio.run(send())


def scripted_app(
    backend: ScriptedBackend, metrics: Metrics, names: ScriptedNames | None = None, **settings: Any
) -> FastAPI:
    """The whole app. /admin is off without a key, so that of its registrar only the names are asked."""
    registrar = cast(Registrar, names or ScriptedNames())
    return create_app(backend, Settings(bundle=Path("none"), **settings), metrics, registrar)


def events(answer: httpx.Response) -> list[str]:
    return [part.removeprefix("data: ") for part in answer.text.split("\n\n") if part]
