"""llama.cpp's own routes: `/completion`, `/lora-adapters`, `/props`."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, PlainValidator, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from service.api.wire.answers import Answer, RoutingAnswer
from service.api.wire.base import UNSUPPORTED_FIELD, Neutral, WireModel, at_fault
from service.api.wire.fields import Stop, Temperature
from service.api.wire.lora import Lora
from service.api.wire.request import Gates, ModelName, RoutingOptions

SAMPLERS = ["penalties", "temperature", "min_p", "top_k", "top_p"]
"""The order in which this server applies what the fields of a body ask for."""

RANDOM_SEEDS = (-1, 2**32 - 1)
"""llama.cpp's ways to ask for a fresh seed."""

Part = str | int
"""Text to tokenise, or a token id."""

_BIASED = 1024
_LARGEST_BIAS = 100

Bias = float | Literal[False]
"""An addition to a logit, or false: that token never comes up."""


def _prompts(value: Any) -> tuple[tuple[Part, ...], ...]:
    """llama.cpp's forms of `prompt` → one or more prompts, each a row of texts and token ids."""
    single = isinstance(value, str) or (isinstance(value, list) and any(type(item) is int for item in value))
    items = [value] if single else value
    if not isinstance(items, list) or not items:
        raise ValueError("must be a string, a list of token ids and strings, or a list of such prompts")
    prompts: list[tuple[Part, ...]] = []
    for index, item in enumerate(items):
        parts = [item] if isinstance(item, str) else item
        if isinstance(parts, dict):
            place = "" if single or len(items) == 1 else f"[{index}]."
            raise PydanticCustomError(UNSUPPORTED_FIELD, "multimodal", {"name": f"{place}prompt_string"})
        if not isinstance(parts, list) or not all(
            type(part) is int or isinstance(part, str) for part in parts
        ):
            raise ValueError(f"item {index} must be a string, or a list of token ids and strings")
        if not any(part != "" for part in parts):
            raise ValueError("an empty prompt cannot be continued" + (f" (item {index})" if index else ""))
        prompts.append(tuple(parts))
    return tuple(prompts)


def _logit_bias(value: Any) -> tuple[tuple[Part, Bias], ...]:
    """Pairs of a token and its bias, or an object of them; a token is its id or a text."""
    pairs: list[Any]
    if isinstance(value, dict):
        pairs = [
            [int(name) if name.isascii() and name.isdigit() else name, bias] for name, bias in value.items()
        ]
    elif isinstance(value, list):
        pairs = value
    else:
        raise ValueError('must be a list of pairs like [15043, 1.0], or an object like {"15043": 1.0}')
    if len(pairs) > _BIASED:
        raise ValueError(f"has {len(pairs)} entries; at most {_BIASED} tokens can be biased")
    found: list[tuple[Part, Bias]] = []
    for index, pair in enumerate(pairs):
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"entry {index} must be a pair of a token and its bias")
        token, bias = pair
        if not (type(token) is int and token >= 0) and not (isinstance(token, str) and token):
            raise ValueError(f"entry {index} must begin with a token id, a whole number from 0, or a text")
        if bias is False:
            found.append((token, False))
        elif type(bias) in (int, float) and -_LARGEST_BIAS <= bias <= _LARGEST_BIAS:
            found.append((token, float(bias)))
        else:
            raise ValueError(
                f"the bias of entry {index} must be false, which bans the token, or a number from "
                f"-{_LARGEST_BIAS} to {_LARGEST_BIAS}"
            )
    return tuple(found)


_PROMPT: dict[str, Any] = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": ["string", "integer"]}, "minItems": 1}]
}
Prompts = Annotated[
    tuple[tuple[Part, ...], ...],
    PlainValidator(_prompts),
    WithJsonSchema({"anyOf": [*_PROMPT["anyOf"], {"type": "array", "items": _PROMPT, "minItems": 1}]}),
]
_BIAS = {"anyOf": [{"const": False}, {"type": "number", "minimum": -_LARGEST_BIAS, "maximum": _LARGEST_BIAS}]}
LogitBias = Annotated[
    tuple[tuple[Part, Bias], ...],
    PlainValidator(_logit_bias),
    WithJsonSchema(
        {
            "anyOf": [
                {
                    "type": "array",
                    "items": {"type": "array", "minItems": 2, "maxItems": 2, "items": {}},
                    "maxItems": _BIASED,
                },
                {"type": "object", "additionalProperties": _BIAS, "maxProperties": _BIASED},
            ]
        }
    ),
]


class LlamaBody(WireModel):
    """`POST /completion`. Defaults are llama.cpp's."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "prompt": "Forms of walk",
                    "n_predict": 16,
                    "temperature": 0,
                    "lora": [{"id": 0, "scale": 0.5}, {"id": 1, "scale": 0.5}],
                }
            ]
        }
    )
    unsupported: ClassVar[Neutral] = {
        "adaptive_target": (-1.0,),
        "backend_sampling": (False,),
        "dry_allowed_length": (2,),
        "dry_base": (1.75,),
        "dry_multiplier": (0.0,),
        "dry_penalty_last_n": (64, 0, -1),
        "dry_sequence_breakers": (["\n", ":", '"', "*"],),
        "dynatemp_exponent": (1.0,),
        "dynatemp_range": (0.0,),
        "id_slot": (-1,),
        "min_keep": (0,),
        "mirostat": (0,),
        "mirostat_eta": (0.1,),
        "mirostat_tau": (5.0,),
        "n_cache_reuse": (0,),
        "n_discard": (0,),
        "n_indent": (0,),
        "n_keep": (0, -1),
        "post_sampling_probs": (False,),
        "response_fields": ([],),
        "return_progress": (False,),
        "samplers": (SAMPLERS,),
        "sse_ping_interval": (),
        "t_max_predict_ms": (0, -1),
        "timings_per_token": (False,),
        "top_n_sigma": (-1.0,),
        "typical_p": (1.0,),
        "verbose": (False,),
        "xtc_probability": (0.0,),
        "xtc_threshold": (0.1,),
    }

    prompt: Prompts
    n_predict: int = Field(
        default=-1, ge=-1, description="-1 goes on until the context is full; 0 only computes the prompt"
    )
    n_cmpl: int = Field(default=1, ge=1, description="choices of each prompt")
    temperature: Temperature = 0.8
    top_k: int = Field(default=40, ge=-1, description="0 or -1 keeps all")
    top_p: float = Field(default=0.95, gt=0, le=1)
    min_p: float = Field(default=0.05, ge=0, le=1)
    repeat_penalty: float = Field(default=1.0, ge=0.01, le=10)
    repeat_last_n: int | None = Field(
        default=None, ge=-1, description="beside a penalty only -1: all tokens of prompt and answer count"
    )
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    logit_bias: LogitBias = ()
    ignore_eos: bool = False
    stop: Stop = ()
    seed: int = Field(default=-1, ge=-1, le=2**63 - 1, description="-1 and 4294967295 draw a fresh one")
    n_probs: int = Field(default=0, ge=0, description="likeliest tokens that are reported beside each one")
    return_tokens: bool = False
    cache_prompt: bool | None = Field(
        default=None, description="false only where TWINSERVE_PREFIX_CACHE is off"
    )
    json_schema: dict[str, Any] | None = Field(default=None, description="the answer is JSON of that schema")
    grammar: str = Field(default="", description="GBNF: the answer is a sentence of that grammar")
    stream: bool = False
    lora: Lora = Field(default=[], description="scales by the ids of GET /lora-adapters; others are 0")
    model: ModelName | None = Field(default=None, description="extension: as in /v1/completions")
    gates: Gates | None = Field(default=None, description="extension: weights by expert instead of `lora`")
    routing: RoutingOptions | None = Field(default=None, description="extension: options of the router")
    timeout: float | None = Field(
        default=None, gt=0, description="extension: seconds after which the request fails with 504"
    )

    @model_validator(mode="after")
    def _no_contradictions(self) -> "LlamaBody":
        if sum((bool(self.lora), self.gates is not None, self.routing is not None)) > 1:
            raise at_fault("lora", "give one of lora, gates and routing")
        if self.json_schema is not None and self.grammar:
            raise at_fault("grammar", "give either it or json_schema")
        penalties = (self.repeat_penalty - 1, self.presence_penalty, self.frequency_penalty)
        if any(penalties) and self.repeat_last_n not in (None, -1):
            raise at_fault("repeat_last_n", "beside a penalty it must be -1, since all tokens count here")
        return self


class Probability(Answer):
    """One token that could have been, with the bytes that it adds."""

    id: int
    token: str
    bytes: list[int]
    logprob: float


class TokenProbability(Probability):
    """One token of the answer."""

    top_logprobs: list[Probability]


Probabilities = Annotated[list[TokenProbability] | None, Field(exclude_if=lambda value: value is None)]
"""Left out where nobody asked for them."""


class Timings(Answer):
    """As the client waited: `prompt_ms` is the time to the first token, queue and router included."""

    cache_n: int
    prompt_n: int
    prompt_ms: float
    prompt_per_token_ms: float | None
    prompt_per_second: float | None
    predicted_n: int
    predicted_ms: float
    predicted_per_token_ms: float | None
    predicted_per_second: float | None


class LlamaPiece(Answer):
    """A chunk of a stream."""

    index: int
    content: str
    tokens: list[int]
    stop: Literal[False] = False
    id_slot: int = -1
    tokens_predicted: int
    tokens_evaluated: int
    completion_probabilities: Probabilities = None


class LlamaAnswer(Answer):
    """A finished choice, or the last chunk of its stream, which has no content."""

    index: int
    content: str
    tokens: list[int]
    id_slot: int = -1
    stop: Literal[True] = True
    model: str
    tokens_predicted: int
    tokens_evaluated: int
    generation_settings: Mapping[str, Any]
    prompt: str
    has_new_line: bool
    truncated: Literal[False] = False
    stop_type: Literal["eos", "limit", "word"]
    stopping_word: str
    tokens_cached: int
    timings: Timings
    completion_probabilities: Probabilities = None
    routing: RoutingAnswer | None = None


class Adapter(Answer):
    """One expert as llama.cpp lists adapters.

    Attributes:
        path: its name; where its files lie is the operator's business.
        scale: of requests to llama.cpp's routes that name no scales; 0 where the router chooses.
        chosen_by: what gives such requests their gates: our addition.
    """

    id: int
    path: str
    scale: float
    task_name: str = ""
    prompt_prefix: str = ""
    generation: int
    chosen_by: Literal["router", "scales"]


class LlamaErrorFields(Answer):
    """What went wrong; `param` is the field at fault."""

    code: int
    message: str
    type: str
    param: str | None


class LlamaError(Answer):
    """Every answer of a status from 400."""

    error: LlamaErrorFields
