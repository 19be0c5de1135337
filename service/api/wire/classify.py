"""`POST /v1/classify`: bodies and answers, as vLLM's endpoint of that name with what we add."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from service.api.wire.answers import Answer, RoutingAnswer
from service.api.wire.base import Neutral, WireModel
from service.api.wire.request import Gates, ModelName


def _texts(value: Any) -> Any:
    """A text, or a list of texts → a list of texts."""
    return [value] if isinstance(value, str) else value


class ClassifyRouting(WireModel):
    """How the router's probabilities become gates. There is no abstaining: a label needs an expert's head."""

    top_k: int | None = Field(default=None, ge=1, le=1024)
    threshold: float | None = Field(default=None, ge=0, le=1)


class ClassifyBody(WireModel):
    """One or more texts, and who classifies them.

    Attributes:
        model: the classifier's name asks its router, an expert's name takes that expert; the classifier if left
            out.
        gates: weights over experts instead; the largest one's label set and head answer.
        truncate_prompt_tokens: cut texts on the right to that many tokens.
    """

    unsupported: ClassVar[Neutral] = {
        "activation": (True,),
        "add_special_tokens": (True,),
        "priority": (0,),
        "request_id": (),
        "softmax": (True,),
        "use_activation": (True,),
    }

    model: ModelName | None = None
    input: Annotated[list[str], Field(min_length=1, fail_fast=True), BeforeValidator(_texts)]
    gates: Gates | None = None
    routing: ClassifyRouting | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=3)] | None = None
    user: str | None = None


class ClassifyChoice(Answer):
    """The answer to one text.

    Attributes:
        label: the likeliest of the expert's labels.
        score: its probability.
        probs: of all labels, in the head's order (vLLM's field).
        scores: label → probability, likeliest first.
        expert: whose label set and head it is.
    """

    index: int
    label: str
    score: float
    probs: list[float]
    num_classes: int
    scores: Mapping[str, float]
    expert: str
    routing: RoutingAnswer


class ClassifyAnswer(Answer):
    """All of them."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[ClassifyChoice]
    usage: Mapping[str, int]
