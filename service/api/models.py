"""`/v1/models`: the names that `model` can be."""

import time

from fastapi import APIRouter, Response

from service.api.backend import Backend
from service.api.naming import SHARED, pinned
from service.api.refusals import refusals
from service.api.wire.answers import ModelAnswer, ModelList
from service.classify import Classifier
from service.errors import ModelNotFoundError


def add_routes(router: APIRouter, backend: Backend, classifier: Classifier | None = None) -> None:
    """Put `GET /v1/models` and `GET /v1/models/{name}` on `router`."""
    created = int(time.time())

    def models() -> list[ModelAnswer]:
        def answer(
            name: str, kind: str, generation: int | None = None, longest: int = backend.max_context
        ) -> ModelAnswer:
            return ModelAnswer.model_validate(
                {
                    "id": name,
                    "created": created,
                    "kind": kind,
                    "max_model_len": longest,
                    "generation": generation,
                }
            )

        experts = [status for status in backend.experts() if status.state == "active"]
        return [
            answer(backend.bundle_name, "router"),
            *(answer(status.name, "expert", status.generation) for status in experts),
            answer(SHARED, "shared"),
            *([answer(classifier.name, "classifier", longest=classifier.max_tokens)] if classifier else []),
        ]

    @router.get("/v1/models", response_model=ModelList)
    async def list_models() -> Response:
        """List the bundle's name (the router chooses), every expert, the shared expert, and a classifier."""
        return Response(ModelList(data=models()).dump(), media_type="application/json")

    @router.get("/v1/models/{name:path}", response_model=ModelAnswer, responses=refusals(ModelNotFoundError))
    async def get_model(name: str) -> Response:
        """Describe one of them, by its name or, an expert, by `name@generation`."""
        known = {model.id: model for model in models()}
        if name not in known and "@" in name:
            name, _ = pinned(name, backend)
        if name in known:
            return Response(known[name].dump(), media_type="application/json")
        raise ModelNotFoundError(
            f"The model {name[:256]!r} does not exist; GET /v1/models lists the names.", param="model"
        )
