"""`POST /v1/embeddings`: OpenAI's fields, a few of vLLM's, and who reads the texts."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, PlainValidator, WithJsonSchema

from service.api.wire.answers import Answer, RoutingAnswer
from service.api.wire.base import Neutral, WireModel
from service.api.wire.completions import PromptItem, parse_prompt
from service.api.wire.fields import RequestId, Truncation
from service.api.wire.sampling import Gates, ModelName, RoutingOptions
from service.core import Pooling


def _inputs(value: Any) -> tuple[PromptItem, ...]:
    """OpenAI's four forms of `input` → one or more texts or lists of ids, none empty."""
    if value == "" or (isinstance(value, list) and any(item in ("", []) for item in value)):
        raise ValueError("an empty text has no embedding")
    return parse_prompt(value)


_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_TEXT = {"type": "string", "minLength": 1}
Inputs = Annotated[
    tuple[PromptItem, ...],
    PlainValidator(_inputs),
    WithJsonSchema(
        {
            "anyOf": [
                _TEXT,
                {"type": "array", "items": _TEXT, "minItems": 1},
                _IDS,
                {"type": "array", "items": _IDS, "minItems": 1},
            ]
        }
    ),
]


class EmbeddingBody(WireModel):
    """One or more texts to place in the model's space of states.

    Vectors can be compared where they were made by the same weights: those of `shared`, of one expert or of the same
    `gates` with each other. With the bundle's name the router chooses weights for each text by itself.
    """

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": "shared", "input": ["a river", "a stream"]}]}
    )

    unsupported: ClassVar[Neutral] = {
        "cache_salt": (),
        "embed_dtype": ("float32",),
        "endianness": ("native", "little"),
        "messages": (),
        "use_activation": (True,),
    }

    model: ModelName
    input: Inputs
    encoding_format: Literal["float", "base64"] = Field(
        default="float", description="base64: of little-endian float32 values"
    )
    dimensions: int | None = Field(
        default=None, ge=1, description="keep that many first values, then normalise; not trained for"
    )
    pooling: Pooling = Field(
        default="mean", description="extension: of the final states of all tokens, or the last token's"
    )
    normalize: bool = Field(default=True, description="vLLM's: divide by the Euclidean length")
    add_special_tokens: bool = Field(
        default=True, description="vLLM's: the tokenizer's own around an input that is text"
    )
    truncate_prompt_tokens: Truncation | None = Field(
        default=None, description="vLLM's: keep that many tokens of an input's end; -1 keeps what fits"
    )
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


_UNROUTED: dict[str, Any] = {
    "gates": {},
    "pattern": "shared",
    "mode": "shared",
    "generations": {},
    "router_generation": None,
    "confidence": None,
    "abstained": False,
    "explored": False,
}


class EmbeddingItem(Answer):
    """The embedding of one input, as numbers or as base64."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str
    routing: RoutingAnswer | None = None


class EmbeddingAnswer(Answer):
    """All of them; `routing` as a whole where there is one input."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": "embd-5f1d",
                    "object": "list",
                    "created": 1767225600,
                    "model": "shared",
                    "data": [
                        {"object": "embedding", "index": 0, "embedding": [0.6, -0.8], "routing": _UNROUTED},
                        {"object": "embedding", "index": 1, "embedding": [0.8, -0.6], "routing": _UNROUTED},
                    ],
                    "usage": {"prompt_tokens": 4, "total_tokens": 4},
                    "routing": None,
                }
            ]
        }
    )

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[EmbeddingItem]
    usage: Mapping[str, int]
    routing: RoutingAnswer | None = None
