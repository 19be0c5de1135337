"""`/v1/classify`: texts → labels, each by the expert that the router or the client chose."""

import time
import uuid
from collections.abc import Mapping

from fastapi import APIRouter, Request, Response

from service.api.generation import while_connected
from service.api.naming import check_weight
from service.api.refusals import ROUTING, merged, refusals
from service.api.wire.answers import RoutingAnswer
from service.api.wire.classify import ClassifyAnswer, ClassifyBody, ClassifyChoice
from service.classify import Classified, Classifier, Text
from service.core import RoutingChoice
from service.errors import (
    ClassifierDisabledError,
    InvalidRequestError,
    LimitExceededError,
    ModelNotFoundError,
    UnknownExpertError,
)
from service.settings import Settings

_REFUSALS = merged(ROUTING, refusals(ClassifierDisabledError))


def add_routes(router: APIRouter, classifier: Classifier | None, settings: Settings) -> None:
    """Put `POST /v1/classify` on `router`; without a classifier it says how to get one."""

    @router.post("/v1/classify", response_model=ClassifyAnswer, responses=_REFUSALS)
    async def classify(request: Request, body: ClassifyBody) -> Response:
        """Label every text, and tell which experts did it with which weights."""
        if classifier is None:
            raise ClassifierDisabledError(
                "This server has no classifier: build a bundle with `twinserve classifier build` and start the "
                "server with TWINSERVE_CLASSIFIER set to its folder."
            )
        choice = choose(body, classifier, settings.max_gate)
        if len(body.input) > settings.max_prompts:
            raise LimitExceededError(
                f"input has {len(body.input)} texts; the limit is {settings.max_prompts} (max_prompts).",
                param="input",
            )
        ids = await classifier.encode(body.input, body.truncate_prompt_tokens)
        texts = [Text(tokens, choice) for tokens in ids]
        answers = await while_connected(request, classifier.classify(texts))
        tokens = sum(len(text.ids) for text in texts)
        answer = ClassifyAnswer(
            id=f"classify-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=body.model or classifier.name,
            data=[_choice(index, found) for index, found in enumerate(answers)],
            usage={"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens},
        )
        return Response(answer.dump(), media_type="application/json")


def choose(body: ClassifyBody, classifier: Classifier, max_gate: float) -> RoutingChoice:
    """What `model`, `gates` and `routing` of a body mean together.

    Raises:
        ModelNotFoundError: `model` names nothing that classifies.
        UnknownExpertError: a gate names no expert.
        LimitExceededError: a weight beyond `max_gate`.
        InvalidRequestError: the three contradict each other, no gate is positive, or there is no router.
    """
    model = body.model or classifier.name
    routed = model == classifier.name
    if not routed and model not in classifier.labels:
        names = ", ".join([classifier.name, *classifier.labels])
        raise ModelNotFoundError(f"No classifier {model!r}; there are {names}.", param="model")
    for field, given in (("gates", body.gates), ("routing", body.routing)):
        if given is not None and not routed:
            raise InvalidRequestError(
                f"{field!r} chooses among experts: send it with model {classifier.name!r}, not {model!r}.",
                param=field,
            )
    if body.gates is not None:
        if body.routing is not None:
            raise InvalidRequestError(
                "'routing' sets up the router, which 'gates' replace; send one of them.", param="routing"
            )
        _check_gates(body.gates, classifier, max_gate)
        return RoutingChoice(gates=body.gates)
    if not routed:
        return RoutingChoice(gates={model: 1.0})
    if not classifier.has_router:
        raise InvalidRequestError(
            "This classifier has no router; name an expert as 'model', or give 'gates'.", param="model"
        )
    if body.routing is None:
        return RoutingChoice()
    return RoutingChoice(top_k=body.routing.top_k, threshold=body.routing.threshold)


def _check_gates(gates: Mapping[str, float], classifier: Classifier, max_gate: float) -> None:
    for name, weight in gates.items():
        param = f"gates.{name[:64]}"
        if name not in classifier.labels:
            raise UnknownExpertError(f"The classifier has no expert {name[:64]!r}.", param=param)
        check_weight(param, weight, max_gate)
    if not any(weight > 0 for weight in gates.values()):
        raise InvalidRequestError(
            "'gates' needs a positive weight: the label set is that of the largest one.", param="gates"
        )


def _choice(index: int, found: Classified) -> ClassifyChoice:
    probabilities = dict(zip(found.labels, found.probabilities, strict=True))
    return ClassifyChoice(
        index=index,
        label=found.labels[found.best],
        score=found.probabilities[found.best],
        probs=list(found.probabilities),
        num_classes=len(found.labels),
        scores=dict(sorted(probabilities.items(), key=lambda item: -item[1])),
        expert=found.expert,
        routing=RoutingAnswer.of(found.routing),
    )
