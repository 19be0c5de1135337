"""Fields that completions and chats share: how tokens are chosen and which experts are mixed."""

from typing import ClassVar

from pydantic import Field, model_validator

from service.api.wire.base import Neutral, WireModel, at_fault
from service.api.wire.fields import (
    BadWords,
    LogitBias,
    Metadata,
    SomeTokenIds,
    Stop,
    Temperature,
    TokenIds,
    Truncation,
)
from service.api.wire.lora import Lora
from service.api.wire.request import RequestFields
from service.api.wire.structured import StructuredFields

SHARED_NEUTRAL: Neutral = {
    "best_of": (1,),
    "service_tier": ("auto", "default"),
    "store": (False,),
    # vLLM's
    "cache_salt": (),
    "detokenize": (True,),
    "early_stopping": (False,),
    "guided_decoding_backend": ("auto", "guidance", "outlines", "xgrammar", "lm-format-enforcer"),
    "guided_whitespace_pattern": (),
    "kv_transfer_params": (),
    "length_penalty": (1.0,),
    "logits_processors": ([],),
    "spaces_between_special_tokens": (True,),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    # other servers' ways to name adapters: `gates` is ours
    "adapter_id": (),
    "merged_adapters": (),
}


class StreamOptions(WireModel):
    """What a stream carries besides text."""

    unsupported: ClassVar[Neutral] = {"include_obfuscation": (False,)}

    include_usage: bool = Field(default=False, description="a last chunk without choices tells the usage")
    continuous_usage_stats: bool = Field(
        default=False, description="vLLM's: every chunk tells its choice's usage so far"
    )


class SamplingBody(RequestFields, StructuredFields):
    """Fields of both generating endpoints. Ranges are OpenAI's and vLLM's."""

    n: int = Field(default=1, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Temperature = 1.0
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
    allowed_token_ids: SomeTokenIds | None = Field(
        default=None, description="vLLM's: nothing else is ever chosen"
    )
    bad_words: BadWords = Field(default=(), description="vLLM's: words that must not come up")
    include_stop_str_in_output: bool = Field(
        default=False, description="vLLM's: the stop string, or stop token, is part of the text"
    )
    skip_special_tokens: bool = Field(default=True, description="vLLM's: special tokens leave no text")
    prompt_logprobs: int | None = Field(
        default=None,
        ge=0,
        description="vLLM's: log-probabilities of each token of the prompt and of that many likeliest ones",
    )
    return_token_ids: bool = Field(default=False, description="vLLM's: ids of the prompt and of each choice")
    return_tokens_as_token_ids: bool = Field(
        default=False, description="vLLM's: log-probabilities name tokens as token_id:<id>"
    )
    truncate_prompt_tokens: Truncation | None = Field(
        default=None, description="vLLM's: keep that many tokens of a prompt's end; -1 keeps what fits"
    )
    metadata: Metadata = Field(default={}, description="opaque; nothing is stored, so it changes nothing")
    lora: Lora = Field(
        default=[], description="llama.cpp's: scales by the ids of GET /lora-adapters, instead of `gates`"
    )

    reported_by: ClassVar[str] = "logprobs"
    """The field behind `reported`."""

    @model_validator(mode="after")
    def _one_mix(self) -> "SamplingBody":
        if self.lora and (self.gates is not None or self.routing is not None):
            raise at_fault("lora", "it mixes experts itself; send it without gates and routing")
        return self

    @property
    def reported(self) -> int | None:
        """How many likeliest tokens to report beside each generated one; None reports nothing."""
        return None

    @property
    def prompt_reported(self) -> int | None:
        """The same for the prompt's tokens."""
        return self.prompt_logprobs
