"""Fields of every body that the engine answers: who reads or writes, with which mix, and when."""

import math
from typing import Annotated, Any

from pydantic import Field, PlainValidator, StringConstraints, WithJsonSchema

from service.api.wire.base import WireModel
from service.api.wire.fields import RequestId

ModelName = Annotated[str, StringConstraints(min_length=1, max_length=256)]


def _gates(value: Any) -> dict[str, float]:
    """An object of finite weights; how large and how many is checked later."""
    if not isinstance(value, dict):
        raise ValueError('must be an object of weights, like {"expert": 0.7}')
    gates: dict[str, float] = {}
    for name, weight in value.items():
        try:
            gates[name] = float(weight) if type(weight) in (int, float) else math.nan
        except OverflowError:
            gates[name] = math.inf
        if not math.isfinite(gates[name]):
            raise ValueError(f"the weight of {name[:64]!r} must be a finite number")
    return gates


Gates = Annotated[
    dict[str, float],
    PlainValidator(_gates),
    WithJsonSchema({"type": "object", "additionalProperties": {"type": "number"}}),
]


class RoutingOptions(WireModel):
    """Extension: how the router's probabilities become gates."""

    top_k: int | None = Field(default=None, ge=1, le=1024)
    threshold: float | None = Field(default=None, ge=0, le=1)
    temperature: float = Field(
        default=1.0, ge=0.01, le=100, description="divides the router's logits before top_k and threshold"
    )
    router: str | None = Field(
        default=None,
        max_length=256,
        description="which of the bundle's routers; there is one, named by its kind",
    )
    abstain: bool = Field(default=True, description="false: gates for strange prompts too")


class RequestFields(WireModel):
    """What completions, chats, responses and embeddings have in common."""

    model: ModelName
    request_id: RequestId | None = Field(
        default=None, description="vLLM's: part of the answer's id; an X-Request-Id header wins"
    )
    priority: int = Field(default=0, ge=-(2**31), le=2**31 - 1, description="vLLM's: lower goes first")
    timeout: float | None = Field(
        default=None,
        gt=0,
        description="extension: seconds from arrival, after which the request fails with 504",
    )
    user: str | None = Field(default=None, max_length=512, description="opaque; written to no log")
    gates: Gates | None = Field(default=None, description="extension: expert → weight, instead of the router")
    routing: RoutingOptions | None = Field(default=None, description="extension: options of the router")
