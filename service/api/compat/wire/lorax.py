"""LoRAX's (and, but for adapters, TGI's) `/generate`, `/generate_stream`, `/` and `/info`."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, PlainValidator, StringConstraints, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from service.api.wire.answers import Answer, RoutingAnswer
from service.api.wire.base import UNSUPPORTED_FIELD, Neutral, WireModel, at_fault
from service.api.wire.fields import Temperature
from service.api.wire.request import RoutingOptions

AdapterName = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class MergedAdapters(WireModel):
    """Experts and their weights, which are added exactly; nothing is trimmed, dropped or elected.

    Attributes:
        density: does nothing in a linear merge, as in LoRAX, whose client always sends one.
        majority_sign_method: likewise.
    """

    ids: list[AdapterName] = Field(min_length=1, max_length=1024)
    weights: list[float] = Field(min_length=1, max_length=1024)
    merge_strategy: Literal["linear", "ties", "dare_linear", "dare_ties"] = Field(
        default="linear", description="others than linear are refused: `twinserve build` has them, offline"
    )
    density: float = Field(default=0.0, ge=0, le=1)
    majority_sign_method: Literal["total", "frequency"] = "total"

    @model_validator(mode="after")
    def _linear(self) -> "MergedAdapters":
        if self.merge_strategy != "linear":
            raise PydanticCustomError(UNSUPPORTED_FIELD, "no such merge", {"name": "merge_strategy"})
        if len(self.ids) != len(self.weights):
            raise at_fault("weights", f"{len(self.weights)} for {len(self.ids)} ids; each id needs one")
        if len(set(self.ids)) != len(self.ids):
            raise at_fault("ids", "one is given twice")
        return self


def _response_format(value: Any) -> dict[str, Any] | None:
    """`{"type": "json_object", "schema": {…}}` → the schema, which is any object's if there is none."""
    if not isinstance(value, dict) or not value.keys() <= {"type", "schema"}:
        raise ValueError('must be an object like {"type": "json_object", "schema": {…}}')
    kind, schema = value.get("type"), value.get("schema")
    if kind not in ("json_object", "json_schema", "text"):
        raise ValueError('its \'type\' must be "json_object", "json_schema" or "text"')
    if schema is not None and not isinstance(schema, dict):
        raise ValueError("its 'schema' must be an object")
    if kind == "text":
        return None
    return schema or {"type": "object"}


ResponseFormat = Annotated[
    dict[str, Any] | None,
    PlainValidator(_response_format),
    WithJsonSchema(
        {
            "type": "object",
            "properties": {
                "type": {"enum": ["json_object", "json_schema", "text"]},
                "schema": {"type": "object"},
            },
            "required": ["type"],
            "additionalProperties": False,
        }
    ),
]


class Parameters(WireModel):
    """How to generate."""

    unsupported: ClassVar[Neutral] = {
        "adapter_source": ("local",),
        "api_token": (),
        "apply_chat_template": (False,),
        "typical_p": (1.0,),
        "watermark": (False,),
        # TGI's
        "grammar": (),
        "top_n_tokens": (),
    }

    adapter_id: AdapterName | None = Field(
        default=None, description="an expert; the shared expert is __base_model__; none asks the router"
    )
    merged_adapters: MergedAdapters | None = None
    max_new_tokens: int | None = Field(default=None, ge=1, description="all that fits if not given")
    ignore_eos_token: bool = False
    do_sample: bool = Field(default=False, description="a temperature, top_k or top_p sample too")
    temperature: Temperature | None = Field(default=None, description="0 is greedy")
    top_k: int | None = Field(default=None, ge=1)
    top_p: float | None = Field(default=None, gt=0, le=1)
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=10)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    seed: int | None = Field(default=None, ge=0, le=2**64 - 1)
    stop: list[Annotated[str, StringConstraints(min_length=1)]] = Field(default=[])
    truncate: int | None = Field(default=None, ge=1, le=2**31 - 1, description="keep the last tokens only")
    best_of: int | None = Field(default=None, ge=1)
    return_full_text: bool = False
    details: bool = False
    decoder_input_details: bool = False
    return_k_alternatives: int | None = Field(default=None, ge=1)
    response_format: ResponseFormat = Field(default=None, description="the answer is JSON of that schema")
    routing: RoutingOptions | None = Field(default=None, description="extension: options of the router")
    timeout: float | None = Field(
        default=None, gt=0, description="extension: seconds after which the request fails with 504"
    )

    @model_validator(mode="after")
    def _no_contradictions(self) -> "Parameters":
        if self.adapter_id is not None and self.merged_adapters is not None:
            raise at_fault("adapter_id", "give at most one of it and merged_adapters")
        if self.routing is not None and not (self.adapter_id is None and self.merged_adapters is None):
            raise at_fault("routing", "it sets up the router: send it without adapter_id and merged_adapters")
        if self.best_of is not None and self.best_of > 1:
            if not self.sampled:
                raise at_fault("best_of", "it needs sampling; set do_sample")
            if self.seed is not None:
                raise at_fault("best_of", "it draws its own seeds; leave seed out")
        return self

    @property
    def sampled(self) -> bool:
        """Tokens are drawn, not simply the likeliest ones."""
        warped = (
            self.temperature not in (None, 1.0) or self.top_k is not None or self.top_p not in (None, 1.0)
        )
        return (self.do_sample or warped) and self.temperature != 0


_EXAMPLE: dict[str, Any] = {
    "inputs": "Forms of walk",
    "parameters": {
        "merged_adapters": {"ids": ["inflect", "spell"], "weights": [0.7, 0.3]},
        "max_new_tokens": 16,
        "details": True,
    },
}


class GenerateBody(WireModel):
    """`POST /generate`; `stream` is for `POST /`."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE]})
    unsupported: ClassVar[Neutral] = {"stream": (False,)}

    inputs: Annotated[str, StringConstraints(min_length=1)]
    parameters: Parameters = Parameters()


class GenerateStreamBody(GenerateBody):
    """`POST /generate_stream`."""

    unsupported: ClassVar[Neutral] = {"stream": (True,)}

    @model_validator(mode="after")
    def _plain(self) -> "GenerateStreamBody":
        refuse_in_stream(self.parameters)
        return self


class EitherBody(GenerateBody):
    """`POST /`, which the Python clients use: `stream` says which of both."""

    unsupported: ClassVar[Neutral] = {}

    stream: bool = False

    @model_validator(mode="after")
    def _plain(self) -> "EitherBody":
        if self.stream:
            refuse_in_stream(self.parameters)
        return self


def refuse_in_stream(parameters: Parameters) -> None:
    """Raise for what no stream can carry."""
    if parameters.best_of is not None and parameters.best_of > 1:
        raise at_fault("parameters.best_of", "only 1 can be streamed")
    if parameters.decoder_input_details:
        raise at_fault("parameters.decoder_input_details", "it cannot be streamed")


def _missing(value: object) -> bool:
    return value is None


class PrefillToken(Answer):
    """A token of the prompt; nothing predicts the first one."""

    id: int
    text: str
    logprob: float | None


class AlternativeToken(Answer):
    """A token that could have been."""

    id: int
    text: str
    logprob: float


class Token(AlternativeToken):
    """A token of the answer; the texts of those that are not special make up its text."""

    special: bool
    alternative_tokens: list[AlternativeToken] | None = Field(default=None, exclude_if=_missing)
    skipped: Literal[False] = False


class StreamDetails(Answer):
    """Counts of a finished answer; `seed` where it was sampled."""

    finish_reason: Literal["length", "eos_token", "stop_sequence"]
    prompt_tokens: int
    generated_tokens: int
    skipped_tokens: Literal[0] = 0
    seed: int | None


class BestOfSequence(Answer):
    """Another choice than the best one."""

    generated_text: str
    finish_reason: Literal["length", "eos_token", "stop_sequence"]
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]


class Details(StreamDetails):
    """And its tokens."""

    prefill: list[PrefillToken]
    tokens: list[Token]
    best_of_sequences: list[BestOfSequence] | None = Field(default=None, exclude_if=_missing)


class GenerateAnswer(Answer):
    """An answer; `routing` is our addition."""

    generated_text: str
    details: Details | None = Field(default=None, exclude_if=_missing)
    routing: RoutingAnswer | None = None


class StreamAnswer(Answer):
    """One token; the last one brings the whole text, the details if asked for, and `routing`."""

    token: Token
    generated_text: str | None
    details: StreamDetails | None
    routing: RoutingAnswer | None = Field(default=None, exclude_if=_missing)


class Info(Answer):
    """What is served, as far as LoRAX's words fit."""

    model_id: str
    model_sha: None = None
    model_pipeline_tag: Literal["text-generation"] = "text-generation"
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_length: int
    max_total_tokens: int
    version: str
    sha: None = None
    docker_label: None = None


class LoraxError(Answer):
    """Every answer of a status from 400."""

    error: str
    error_type: str
