"""Fields that completions and chats share: how tokens are chosen and which experts are mixed."""

import math
import re
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, Field, PlainValidator, StringConstraints, WithJsonSchema

from service.api.wire.base import Neutral, WireModel

ModelName = Annotated[str, StringConstraints(min_length=1, max_length=256)]

_COLDEST = 1e-5
"""vLLM's too: below it a division would give nothing that greedy decoding does not."""

_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")

_BIASED = 1024
"""Tokens that one request may bias: each of its steps pays for every one."""

_LARGEST_BIAS = 100
"""OpenAI's."""

SHARED_NEUTRAL: Neutral = {
    "best_of": (1,),
    "metadata": ({},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    # vLLM's
    "allowed_token_ids": (),
    "bad_words": ([],),
    "cache_salt": (),
    "detokenize": (True,),
    "early_stopping": (False,),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "kv_transfer_params": (),
    "length_penalty": (1.0,),
    "logits_processors": ([],),
    "prompt_logprobs": (),
    "request_id": (),
    "response_format": ({"type": "text"},),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    # other servers' ways to name adapters: `gates` is ours
    "adapter_id": (),
    "lora": ([],),
    "merged_adapters": (),
}


def _stop(value: Any) -> tuple[str, ...]:
    """A string, or a list of strings; none of them empty."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("must be a string or a list of strings")
    if not all(texts):
        raise ValueError("a stop string must not be empty")
    return tuple(texts)


def _token_ids(value: Any) -> tuple[int, ...]:
    """A list of token ids; the vocabulary's end is checked later."""
    if not isinstance(value, list) or not all(type(item) is int and item >= 0 for item in value):
        raise ValueError("must be a list of token ids, whole numbers from 0")
    return tuple(value)


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


def _logit_bias(value: Any) -> dict[int, float]:
    """OpenAI's object of token id → bias; the vocabulary's end is checked later."""
    if not isinstance(value, dict):
        raise ValueError('must be an object of biases, like {"token id": -100}')
    if len(value) > _BIASED:
        raise ValueError(f"has {len(value)} tokens; at most {_BIASED} can be biased")
    biases: dict[int, float] = {}
    for name, bias in value.items():
        # One way to write an id, so that no token is named twice.
        if not _TOKEN_ID.fullmatch(name):
            raise ValueError(f"{name[:64]!r} is not a token id")
        if type(bias) not in (int, float) or not -_LARGEST_BIAS <= bias <= _LARGEST_BIAS:
            raise ValueError(
                f"the bias of token {name} must be a number from -{_LARGEST_BIAS} to {_LARGEST_BIAS}"
            )
        biases[int(name)] = float(bias)
    return biases


def _temperature(value: float) -> float:
    """0, or large enough to divide logits by."""
    if 0 < value < _COLDEST:
        raise ValueError(f"must be 0, which is greedy, or at least {_COLDEST:g}")
    return value


Stop = Annotated[
    tuple[str, ...],
    PlainValidator(_stop),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]
TokenIds = Annotated[
    tuple[int, ...],
    PlainValidator(_token_ids),
    WithJsonSchema({"type": "array", "items": {"type": "integer", "minimum": 0}}),
]
Gates = Annotated[
    dict[str, float],
    PlainValidator(_gates),
    WithJsonSchema({"type": "object", "additionalProperties": {"type": "number"}}),
]


LogitBias = Annotated[
    dict[int, float],
    PlainValidator(_logit_bias),
    WithJsonSchema(
        {
            "type": "object",
            "additionalProperties": {"type": "number", "minimum": -_LARGEST_BIAS, "maximum": _LARGEST_BIAS},
            "maxProperties": _BIASED,
        }
    ),
]


class StreamOptions(WireModel):
    """What a stream carries besides text."""

    unsupported: ClassVar[Neutral] = {
        "continuous_usage_stats": (False,),
        "include_obfuscation": (False,),
    }

    include_usage: bool = False


class RoutingOptions(WireModel):
    """Extension: how the router's probabilities become gates."""

    top_k: int | None = Field(default=None, ge=1, le=1024)
    threshold: float | None = Field(default=None, ge=0, le=1)
    abstain: bool = Field(default=True, description="false: gates for strange prompts too")


class SamplingBody(WireModel):
    """Fields of both generating endpoints. Ranges are OpenAI's and vLLM's."""

    model: ModelName
    n: int = Field(default=1, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, AfterValidator(_temperature)] = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1, description="0 or -1 keeps all")
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=10)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    stop: Stop = ()
    stop_token_ids: TokenIds = ()
    min_tokens: int = Field(default=0, ge=0)
    max_tokens: int | None = Field(default=None, ge=1)
    ignore_eos: bool = False
    logit_bias: LogitBias = Field(default={}, description="token id → what is added to its logit")
    priority: int = Field(default=0, ge=-(2**31), le=2**31 - 1, description="vLLM's: lower goes first")
    timeout: float | None = Field(
        default=None,
        gt=0,
        description="extension: seconds from arrival, after which the request fails with 504",
    )
    user: str | None = Field(default=None, max_length=512, description="opaque; written to no log")
    gates: Gates | None = Field(default=None, description="extension: expert → weight, instead of the router")
    routing: RoutingOptions | None = Field(default=None, description="extension: options of the router")

    reported_by: ClassVar[str] = "logprobs"
    """The field behind `reported`."""

    @property
    def reported(self) -> int | None:
        """How many likeliest tokens to report beside each generated one; None reports nothing."""
        return None

    @property
    def prompt_reported(self) -> int | None:
        """The same for the prompt's tokens."""
        return None
