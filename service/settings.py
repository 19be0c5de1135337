"""Everything that an operator can set, read once from `TWINSERVE_*` and frozen.

A command line option of `twinserve serve` wins over the environment, the environment over the default.
Secrets are `SecretStr`: they print as stars. Imports nothing of ours.
"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

ENV_PREFIX = "TWINSERVE_"


class Settings(BaseSettings):
    """The server's settings; every field is the environment variable of that name in capitals."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, frozen=True, extra="forbid", env_ignore_empty=True
    )

    bundle: Path = Field(default=Path(".twinserve/bundle"), description="the bundle folder to serve")
    classifier: Path | None = Field(
        default=None, description="the classifier bundle behind /v1/classify; None is none"
    )
    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: int = Field(default=8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")

    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        default=(), description="keys for /v1, separated by commas; none leaves /v1 open"
    )
    api_keys_file: Path | None = Field(
        default=None, description="a file with one more key a line; # comments"
    )
    admin_key: SecretStr | None = Field(default=None, description="key for /admin; without it /admin is off")
    experts_root: Path | None = Field(default=None, description="the only folder that experts register from")

    max_prompt_tokens: int | None = Field(
        default=None, ge=1, description="a prompt; None is the context less 1"
    )
    max_tokens: int = Field(default=4096, ge=1, description="generated tokens of one sequence")
    default_chat_tokens: int = Field(default=512, ge=1, description="a chat's max_tokens where it names none")
    max_n: int = Field(default=16, ge=1, description="`n`, the choices of one prompt")
    max_prompts: int = Field(default=64, ge=1, description="prompts in one request")
    max_messages: int = Field(default=1024, ge=1, description="messages in one chat")
    max_stop: int = Field(default=8, ge=0, description="stop strings, and stop token ids, of one request")
    max_stop_length: int = Field(default=128, ge=1, description="characters of one stop string")
    max_logprobs: int = Field(
        default=20, ge=0, le=20, description="likeliest tokens reported beside each one"
    )
    max_timeout_seconds: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="the largest `timeout`, and that of requests that name none; None is no bound",
    )
    max_gate: float = Field(default=8.0, gt=0, allow_inf_nan=False, description="a gate's absolute weight")
    max_body_bytes: int = Field(default=2 * 2**20, ge=1024, description="a request body")
    max_json_depth: int = Field(default=32, ge=4, le=256, description="nesting of a JSON body")
    max_profile_prompts: int = Field(default=1000, ge=1, description="prompts of one expert registration")
    max_registrations: int = Field(
        default=8, ge=1, description="registrations and retirements that run or wait; one runs at a time"
    )
    registration_seconds: float = Field(
        default=600.0, gt=0, allow_inf_nan=False, description="what one registration may take"
    )

    max_queue: int = Field(default=256, ge=1, description="sequences that wait beyond those that run")
    max_batch: int = Field(default=32, ge=1, description="sequences that run together")
    max_context: int | None = Field(
        default=None, ge=16, description="tokens of one sequence; None is the model's own, at most 4096"
    )
    kv_cache_bytes: int = Field(
        default=512 * 2**20, ge=1, description="the KV cache; one longest sequence fits in any case"
    )
    prefix_cache: bool = Field(
        default=True, description="prompts that begin alike share what was computed of them"
    )
    prefill_step: int = Field(
        default=1024, ge=16, description="most prompt tokens of a step where nobody decodes"
    )
    prefill_chunk: int = Field(default=96, ge=16, description="most prompt tokens beside decoding sequences")
    max_wait_seconds: float = Field(
        default=10.0,
        gt=0,
        allow_inf_nan=False,
        description="who has waited longer goes by arrival alone, ahead of priorities and fair share",
    )
    fair_share: bool = Field(default=True, description="API keys take turns by the tokens that they got")
    max_active_experts: int | None = Field(
        default=None, ge=1, description="distinct experts that should run together; a soft bound"
    )
    max_experts: int | None = Field(
        default=None, ge=1, description="experts on the device at once; None is all of them"
    )
    max_expert_bytes: int | None = Field(
        default=None, ge=1, description="bytes of their factors; None is no limit"
    )
    pinned_experts: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(), description="experts that never leave the device, separated by commas"
    )
    host_cache_bytes: int = Field(
        default=0, ge=0, description="host memory for experts that left a GPU; unused on a CPU"
    )
    mix_mode: Literal["auto", "factored", "merged"] = Field(
        default="auto",
        description="merged: weights are made for gates that a step has alone; auto: if it pays",
    )
    merged_bytes: int = Field(default=512 * 2**20, ge=0, description="weights made so, at most")
    single_pass: bool = Field(
        default=False,
        description="route a prompt in its own prefill, whose lower layers then go without gates",
    )
    router_top_k: int | None = Field(default=None, ge=1, description="gates kept; None is the bundle's own")
    router_threshold: float | None = Field(
        default=None, ge=0, le=1, description="gates below are dropped; None is the bundle's own"
    )
    feedback: bool = Field(default=False, description="learn gates from `POST /v1/feedback`")
    feedback_dir: Path | None = Field(
        default=None, description="folder of what feedback taught; None forgets it at a restart"
    )
    feedback_epsilon: float = Field(
        default=0.0, ge=0, le=0.5, description="most requests that may go to another expert to learn of it"
    )
    feedback_cap: float = Field(
        default=6.0, gt=0, le=50, description="most that feedback adds to an expert's log-odds"
    )
    feedback_requests: int = Field(default=10_000, ge=1, description="answers that can still be rated")
    feedback_seconds: float = Field(
        default=3600.0, gt=0, allow_inf_nan=False, description="for which one can be rated"
    )
    feedback_snapshot_every: int = Field(default=50, ge=1, description="ratings between two kept versions")
    device: str = Field(default="auto", description="auto, cpu or cuda[:n]")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        default="auto", description="of the weights"
    )
    threads: int | None = Field(
        default=None, ge=1, description="the engine's CPU threads; None is torch's own"
    )
    native: Literal["auto", "on", "off"] = Field(
        default="auto", description="compiled decoder layers on a CPU: where they work, insist, or never"
    )
    native_cache: Path | None = Field(
        default=None, description="folder of the compiled library; None is below the user's cache folder"
    )
    shared_weights: Literal["model", "int8"] = Field(
        default="model",
        description="the shared expert's matrices: as stored, or int8 with a scale a row (compiled layers only)",
    )
    pack_base: bool = Field(default=True, description="reorder base weights for the processor if that gains")

    keepalive_seconds: float = Field(
        default=15.0, gt=0, description="a silent stream gets a comment that often"
    )
    drain_seconds: float = Field(default=30.0, ge=0, description="what SIGTERM lets running requests take")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="least severity"
    )
    log_json: bool = Field(default=False, description="one JSON object a line")

    @field_validator("api_keys", "pinned_experts", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        """`a,b` → (a, b); blanks go."""
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("log_level", mode="before")
    @classmethod
    def _lower(cls, value: object) -> object:
        return value.lower() if isinstance(value, str) else value

    @model_validator(mode="after")
    def _keys_differ(self) -> Self:
        """An admin key that also opens /v1 would be handed to every client."""
        if self.admin_key is not None and any(
            key.get_secret_value() == self.admin_key.get_secret_value() for key in self.api_keys
        ):
            raise ValueError(f"{ENV_PREFIX}ADMIN_KEY must differ from every key of {ENV_PREFIX}API_KEYS")
        return self

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        """What one setting asks for another must not make impossible."""
        if self.max_experts is not None and len(set(self.pinned_experts)) > self.max_experts:
            raise ValueError(
                f"{ENV_PREFIX}PINNED_EXPERTS names {len(set(self.pinned_experts))} experts; only "
                f"{self.max_experts} fit the device ({ENV_PREFIX}MAX_EXPERTS)"
            )
        if self.mix_mode == "merged" and self.native == "off":
            raise ValueError(
                f"{ENV_PREFIX}MIX_MODE=merged needs compiled decoder layers; {ENV_PREFIX}NATIVE is off"
            )
        if self.shared_weights == "int8" and self.native == "off":
            raise ValueError(
                f"{ENV_PREFIX}SHARED_WEIGHTS=int8 needs compiled decoder layers; {ENV_PREFIX}NATIVE is off"
            )
        if self.shared_weights == "int8" and self.mix_mode == "merged":
            raise ValueError(
                f"{ENV_PREFIX}SHARED_WEIGHTS=int8 keeps gates in factors; {ENV_PREFIX}MIX_MODE=merged cannot hold"
            )
        if self.mix_mode == "merged" and not self.merged_bytes:
            raise ValueError(f"{ENV_PREFIX}MIX_MODE=merged needs {ENV_PREFIX}MERGED_BYTES above 0")
        return self

    def all_api_keys(self) -> tuple[SecretStr, ...]:
        """The keys of `api_keys` and of `api_keys_file`.

        Raises:
            ValueError: the file cannot be read or holds no key; an unreadable file must not open /v1.
        """
        if self.api_keys_file is None:
            return self.api_keys
        variable = f"{ENV_PREFIX}API_KEYS_FILE"
        try:
            lines = self.api_keys_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{variable}: cannot read {self.api_keys_file}: {error}") from error
        keys = tuple(
            SecretStr(line.strip()) for line in lines if line.strip() and not line.strip().startswith("#")
        )
        if not keys:
            raise ValueError(f"{variable}: {self.api_keys_file} holds no key; put one a line")
        if self.admin_key is not None and self.admin_key in keys:
            raise ValueError(
                f"{variable}: {self.api_keys_file} repeats {ENV_PREFIX}ADMIN_KEY; they must differ"
            )
        return self.api_keys + keys
