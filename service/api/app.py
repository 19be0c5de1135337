"""The app factory: everything that the app needs comes in as an argument."""

from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from service.api import (
    admin,
    chat,
    classify,
    completions,
    embeddings,
    feedback,
    health,
    models,
    responses,
    route,
    tokenize,
)
from service.api.admin.streamed import is_streamed
from service.api.auth import Gatekeeper
from service.api.backend import Backend
from service.api.body import json_route
from service.api.compat import routes as compat
from service.api.compat.adapters import AdapterIds
from service.api.document import DocumentedApp
from service.api.errors import install_handlers
from service.api.headers import GENERATIONS, PATTERN, ROUTER_GENERATION
from service.api.limits import LimitCallers
from service.api.middleware import Authenticate, LimitBody, Observe, RefuseWhileDraining
from service.api.naming import Naming
from service.api.parts import Parts
from service.api.prompts import PromptEncoder
from service.api.tokens import TokenTexts
from service.classify import Classifier
from service.feedback import Feedback
from service.keys import KeyLimits, Keys
from service.metrics import Metrics
from service.registrar import Registrar
from service.settings import Settings

if TYPE_CHECKING:
    from service.telemetry.tracing import Tracing

_EXPOSED = [
    "X-Request-Id",
    "Retry-After",
    "ETag",
    "Location",
    PATTERN,
    GENERATIONS,
    ROUTER_GENERATION,
    *(
        f"X-RateLimit-{figure}-{what}"
        for figure in ("Limit", "Remaining", "Reset")
        for what in ("requests", "tokens")
    ),
]
"""Headers of answers that a page may read."""


def create_app(
    backend: Backend,
    settings: Settings,
    metrics: Metrics,
    registrar: Registrar,
    classifier: Classifier | None = None,
    tuner: Feedback | None = None,
    tracing: "Tracing | None" = None,
) -> FastAPI:
    """The HTTP server over a running backend.

    Args:
        backend: what generates; stays the caller's to drain and close.
        settings: keys and limits.
        metrics: counts HTTP requests and is scraped at `/metrics`.
        registrar: what `/admin` drives.
        classifier: what `/v1/classify` asks; stays the caller's to close.
        tuner: what `/v1/feedback` feeds.
        tracing: where each request's trace goes; stays the caller's to close.

    Raises:
        ValueError: the keys of the settings cannot be used.
    """
    gatekeeper = Gatekeeper(Keys(settings), metrics_open=settings.metrics_open)
    app = DocumentedApp(
        title="twinserve",
        version=health.server_version(),
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        middleware=[
            Middleware(Observe, metrics=metrics, tracing=tracing),
            *_cross_origin(settings),
            Middleware(Authenticate, gatekeeper=gatekeeper),
            Middleware(RefuseWhileDraining, draining=lambda: backend.alive and not backend.ready),
            Middleware(LimitCallers, default=_limits(settings), metrics=metrics),
            Middleware(
                LimitBody,
                max_bytes=settings.max_body_bytes,
                seconds=settings.body_seconds,
                streamed=is_streamed,
                max_streamed_bytes=settings.max_source_bytes,
            ),
        ],
    )
    install_handlers(app)
    encoder = PromptEncoder(
        backend.tokenizer,
        backend.vocab_size,
        backend.max_context,
        settings.max_prompt_tokens,
        settings.chat_template_seconds,
    )
    texts = TokenTexts(backend.tokenizer)
    router = app.router
    router.route_class = json_route(settings.max_json_depth, log_bodies=settings.log_prompts)
    naming = Naming(backend, registrar, settings.max_gate)
    parts = Parts(backend, settings, encoder, texts, naming, AdapterIds(backend.expert_names))
    completions.add_routes(router, parts)
    chat.add_routes(router, parts)
    route.add_routes(router, backend, settings, encoder, naming)
    classify.add_routes(router, classifier, settings)
    responses.add_routes(router, parts)
    embeddings.add_routes(router, backend, settings, encoder, naming)
    tokenize.add_routes(router, backend, settings, encoder, texts, naming)
    models.add_routes(router, naming, classifier)
    health.add_routes(router, backend, metrics)
    operators = admin.AdminParts(registrar, settings, backend)
    admin.add_routes(router, operators)
    compat.add_routes(router, parts, operators)
    feedback.add_routes(router, tuner)
    return app


def _limits(settings: Settings) -> KeyLimits:
    return KeyLimits(settings.requests_per_minute, settings.tokens_per_minute, settings.max_concurrent)


def _cross_origin(settings: Settings) -> list[Middleware]:
    """Web pages of other origins may call where the operator says so; their keys are in headers, never cookies."""
    if not settings.cors_origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
            allow_headers=[
                "Authorization",
                "Content-Type",
                "Idempotency-Key",
                "If-Match",
                "Last-Event-ID",
                "X-API-Key",
                "X-Request-Id",
                "traceparent",
            ],
            expose_headers=_EXPOSED,
        )
    ]
