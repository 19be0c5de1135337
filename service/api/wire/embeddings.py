"""`POST /v1/embeddings`: OpenAI's fields, a few of vLLM's, and who reads the texts."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, PlainValidator, WithJsonSchema

from service.api.wire.answers import Answer, RoutingAnswer
from service.api.wire.base import Neutral
from service.api.wire.completions import PromptItem, parse_prompt
from service.api.wire.documented import UNROUTED
from service.api.wire.fields import Truncation
from service.api.wire.request import RequestFields
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


class EmbeddingBody(RequestFields):
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
                        {"object": "embedding", "index": 0, "embedding": [0.6, -0.8], "routing": UNROUTED},
                        {"object": "embedding", "index": 1, "embedding": [0.8, -0.6], "routing": UNROUTED},
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
