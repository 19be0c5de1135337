"""`/v1/models`: the names that `model` can be."""

import time

from fastapi import APIRouter, Response

from service.api.naming import SHARED, Naming
from service.api.refusals import NAMING, refusals
from service.api.wire.answers import ModelAnswer, ModelList
from service.classify import Classifier
from service.core import ExpertStatus, RoutingChoice
from service.errors import ModelNotFoundError


def add_routes(router: APIRouter, naming: Naming, classifier: Classifier | None = None) -> None:
    """Put `GET /v1/models` and `GET /v1/models/{name}` on `router`."""
    created = int(time.time())
    backend = naming.backend

    def answer(
        name: str, kind: str, parent: str | None, generation: int | None = None, root: str | None = None
    ) -> ModelAnswer:
        return ModelAnswer.model_validate(
            {
                "id": name,
                "created": created,
                "kind": kind,
                "root": backend.bundle_name if root is None else root,
                "parent": parent,
                "max_model_len": backend.max_context,
                "generation": generation,
            }
        )

    def of(status: ExpertStatus) -> ModelAnswer:
        if status.state == "active":
            return answer(status.name, "expert", backend.bundle_name, status.generation)
        name = f"{status.name}@{status.generation}"
        return answer(name, "generation", status.name, status.generation)

    def models() -> list[ModelAnswer]:
        here = [status for status in backend.experts() if status.state != "retired"]
        live = {status.name: status.generation for status in here if status.state == "active"}
        aliases = sorted(naming.names.served_aliases().items())
        told = [
            answer(backend.bundle_name, "router", None),
            *(of(status) for status in here),
            *(answer(alias, "alias", name, live[name]) for alias, name in aliases if name in live),
            answer(SHARED, "shared", backend.bundle_name),
        ]
        if classifier is not None:
            of_classifier = answer(classifier.name, "classifier", None, root=classifier.name)
            told.append(of_classifier.model_copy(update={"max_model_len": classifier.max_tokens}))
        return told

    @router.get("/v1/models", response_model=ModelList)
    async def list_models() -> Response:
        """List the bundle's name (the router chooses), experts, their aliases and generations on trial, and more.

        Also the shared expert, and a classifier where one is served.
        """
        return Response(ModelList(data=models()).dump(), media_type="application/json")

    @router.get(
        "/v1/models/{name:path}",
        response_model=ModelAnswer,
        responses=refusals(ModelNotFoundError, *NAMING),
    )
    async def get_model(name: str) -> Response:
        """Describe one of them, by its name or, an expert, by `name@generation`."""
        known = {model.id: model for model in models()}
        if name not in known:
            choice = await naming.choose(name)
            known = {model.id: model for model in models()}
            name = next((it for it in (name, *_others(choice)) if it in known), "")
        if name not in known:
            raise ModelNotFoundError("The model is not served any more.", param="model")
        return Response(known[name].dump(), media_type="application/json")


def _others(choice: RoutingChoice) -> list[str]:
    """The listed names of the expert that a choice is of: of its generation, or its own."""
    numbers = choice.generations
    return [listed for name in choice.gates or {} for listed in (f"{name}@{numbers.get(name)}", name)]
