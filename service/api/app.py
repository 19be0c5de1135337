"""The app factory: everything that the app needs comes in as an argument."""

from fastapi import FastAPI
from starlette.middleware import Middleware

from service.api import admin, chat, classify, completions, feedback, health, models, route
from service.api.auth import Gatekeeper
from service.api.backend import Backend
from service.api.body import json_route
from service.api.errors import install_handlers
from service.api.middleware import Authenticate, LimitBody, Observe
from service.api.prompts import PromptEncoder
from service.api.tokens import TokenTexts
from service.classify import Classifier
from service.feedback import Feedback
from service.metrics import Metrics
from service.registrar import Registrar
from service.settings import Settings


def create_app(
    backend: Backend,
    settings: Settings,
    metrics: Metrics,
    registrar: Registrar,
    classifier: Classifier | None = None,
    tuner: Feedback | None = None,
) -> FastAPI:
    """The HTTP server over a running backend.

    Args:
        backend: what generates; stays the caller's to drain and close.
        settings: keys and limits.
        metrics: counts HTTP requests and is scraped at `/metrics`.
        registrar: what `/admin` drives.
        classifier: what `/v1/classify` asks; stays the caller's to close.
        tuner: what `/v1/feedback` feeds.

    Raises:
        ValueError: the file of API keys cannot be read.
    """
    gatekeeper = Gatekeeper(settings.all_api_keys(), settings.admin_key)
    app = FastAPI(
        title="twinserve",
        version=health.server_version(),
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        middleware=[
            Middleware(Observe, metrics=metrics),
            Middleware(Authenticate, gatekeeper=gatekeeper),
            Middleware(LimitBody, max_bytes=settings.max_body_bytes),
        ],
    )
    install_handlers(app)
    encoder = PromptEncoder(
        backend.tokenizer, backend.vocab_size, backend.max_context, settings.max_prompt_tokens
    )
    texts = TokenTexts(backend.tokenizer)
    router = app.router
    router.route_class = json_route(settings.max_json_depth)
    completions.add_routes(router, backend, settings, encoder, texts)
    chat.add_routes(router, backend, settings, encoder, texts)
    route.add_routes(router, backend, settings, encoder)
    classify.add_routes(router, classifier, settings)
    models.add_routes(router, backend, classifier)
    health.add_routes(router, backend, metrics)
    admin.add_routes(router, registrar, settings)
    feedback.add_routes(router, tuner)
    return app
