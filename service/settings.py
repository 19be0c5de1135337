"""Everything that an operator can set, read once from `TWINSERVE_*` and frozen.

A command line option of `twinserve serve` wins over the environment, the environment over the default.
Secrets are `SecretStr`: they print as stars. Imports nothing of ours.
"""

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

ENV_PREFIX = "TWINSERVE_"

_OFTEN_SECONDS = 10.0
"""A server that took care of its registry more often would do little else."""

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\s@]+", re.IGNORECASE)


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
        default=(),
        description="inference keys, plain or `sha256:HASH`, separated by commas; none leaves inference open",
    )
    api_keys_file: Path | None = Field(
        default=None, description="a file with one more a line; # comments; read again when it changes"
    )
    admin_key: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        default=(), description="keys for /admin in the same form; without one /admin is off"
    )
    admin_keys_file: Path | None = Field(default=None, description="a file with one more a line")
    metrics_open: bool = Field(default=False, description="/metrics needs no key where everything else does")
    requests_per_minute: int | None = Field(
        default=None,
        ge=1,
        description="of one key, or of one address where no key is needed; None is no limit",
    )
    tokens_per_minute: int | None = Field(
        default=None, ge=1, description="prompt and generated tokens of the same; None is no limit"
    )
    max_concurrent: int | None = Field(
        default=None, ge=1, description="requests of the same at once; None is no limit"
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(), description="web origins whose pages may call, separated by commas, or `*`; none is off"
    )
    experts_root: Path | None = Field(default=None, description="the only folder that experts register from")

    max_prompt_tokens: int | None = Field(
        default=None, ge=1, description="a prompt; None is the context less 1"
    )
    max_tokens: int = Field(default=4096, ge=1, description="generated tokens of one sequence")
    default_chat_tokens: int = Field(default=512, ge=1, description="a chat's max_tokens where it names none")
    max_n: int = Field(default=16, ge=1, description="`n`, the choices of one prompt")
    max_prompts: int = Field(default=64, ge=1, description="prompts in one request")
    max_embedding_inputs: int = Field(
        default=2048,
        ge=1,
        description="texts in one request for embeddings; max_batch of them queue at a time",
    )
    max_messages: int = Field(default=1024, ge=1, description="messages in one chat")
    chat_template_seconds: float = Field(
        default=5.0, gt=0, allow_inf_nan=False, description="what the chat template may take with one chat"
    )
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
    max_url_bytes: int = Field(default=8192, ge=256, description="path and query of a request")
    max_header_bytes: int = Field(default=32768, ge=1024, description="its header fields together")
    max_headers: int = Field(default=100, ge=16, description="their number")
    header_seconds: float = Field(
        default=20.0, gt=0, allow_inf_nan=False, description="what a request's header may take to arrive"
    )
    body_seconds: float = Field(default=60.0, gt=0, allow_inf_nan=False, description="its body, after that")
    max_grammar_bytes: int = Field(
        default=65536,
        ge=64,
        description="a JSON schema, regex, list of choices or grammar that answers follow",
    )
    max_grammar_seconds: float = Field(
        default=5.0, gt=0, allow_inf_nan=False, description="what a request waits for it to be compiled"
    )
    grammar_cache: int = Field(default=32, ge=1, description="compiled ones that are remembered")
    state_dir: Path | None = Field(
        default=None,
        description="where the registry keeps what is not in the bundle; None is `registry` in the bundle's folder",
    )
    catalogue: SecretStr | None = Field(
        default=None,
        description="the registry's database as a URL, `postgresql://…` or `sqlite:///…`; None is SQLite there",
    )
    blobs: str | None = Field(
        default=None,
        description="the registry's files, a folder or `s3://bucket/prefix`; None is a folder there",
    )
    blob_options: SecretStr | None = Field(
        default=None,
        description="options of the object store as a JSON object, as fsspec takes them; beside AWS_* variables",
    )
    max_profile_prompts: int = Field(default=1000, ge=1, description="prompts of one expert registration")
    max_registrations: int = Field(
        default=64, ge=1, description="registrations that run or wait; one runs at a time"
    )
    registration_seconds: float = Field(
        default=600.0,
        gt=0,
        allow_inf_nan=False,
        description="what one registration may take once it runs; a rebuild as long for each expert",
    )
    registration_attempts: int = Field(
        default=3, ge=1, le=10, description="how often it is begun anew after its process or server died"
    )
    registration_threads: int = Field(
        default=1, ge=1, description="CPU threads of its process, which gives way to the engine"
    )
    registration_bytes: int | None = Field(
        default=None, ge=2**28, description="memory of its process; None is no limit"
    )
    warm_worker: bool = Field(
        default=True, description="a process waits for the next registration, so that it begins at once"
    )
    keep_generations: int = Field(
        default=8,
        ge=1,
        description="newest generations of an expert that garbage collection leaves to roll back to",
    )
    collect_seconds: float = Field(
        default=3600.0,
        ge=0,
        allow_inf_nan=False,
        description="how often a server collects garbage and removes old rows by itself, 10 or more; 0 is never",
    )
    keep_jobs_days: int = Field(
        default=30,
        ge=0,
        le=36500,
        description="ended jobs, failed generations and those without files stay listed for that, and retired "
        "experts can come back; 0 is for ever",
    )
    keep_audit_days: int = Field(
        default=365, ge=0, le=36500, description="lines of the audit log stay for that; 0 is for ever"
    )
    keep_sources: Literal["none", "lora", "all"] = Field(
        default="lora", description="fine-tunes that are kept as they came, for exports and rebuilt bundles"
    )
    max_source_bytes: int = Field(
        default=64 * 2**30, ge=1024, description="the files of one fine-tune together, uploaded or fetched"
    )
    max_uploads: int = Field(
        default=16, ge=1, description="uploads that are begun and not registered or removed"
    )
    upload_seconds: float = Field(
        default=86400.0, gt=0, allow_inf_nan=False, description="an upload that rests longer is removed"
    )
    source_urls: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="URL prefixes that experts register from, `https://…/` or `s3://…/`, by commas; none is off",
    )
    source_private: bool = Field(
        default=False,
        description="such URLs may lead to private addresses, as of a store in the same network",
    )
    signature_keys: Path | None = Field(
        default=None,
        description="a file of trusted Ed25519 public keys; with one, unsigned experts are refused",
    )
    max_relative_error: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="what compression may lose of an expert, of its norm; None only reports it",
    )
    max_norm_ratio: float = Field(
        default=100.0,
        gt=1,
        allow_inf_nan=False,
        description="an expert's norm over its siblings' median, either way; beyond it is refused",
    )
    expert_wait_seconds: float = Field(
        default=5.0,
        ge=0,
        allow_inf_nan=False,
        description="what a request waits for an expert that is registered and not loaded here yet",
    )
    registry_poll_seconds: float = Field(
        default=0.2,
        gt=0,
        le=60,
        allow_inf_nan=False,
        description="how often the catalogue's revision is looked at",
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
        default=15.0,
        gt=0,
        description="a silent stream gets a comment that often, and starts after that long in the queue",
    )
    stall_seconds: float = Field(
        default=30.0,
        gt=0,
        allow_inf_nan=False,
        description="a client that takes nothing of its answer for that long is cut off",
    )
    stream_backlog: int = Field(
        default=1024,
        ge=16,
        description="events of one sequence that wait for a slow client; with more its stream ends in an error",
    )
    drain_seconds: float = Field(default=30.0, ge=0, description="what SIGTERM lets running requests take")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="least severity"
    )
    log_json: bool = Field(default=False, description="one JSON object a line")
    log_prompts: bool = Field(default=False, description="request bodies are logged too")
    otlp_endpoint: str | None = Field(
        default=None,
        description="OTLP/HTTP collector of traces, as http://localhost:4318; OTEL_* variables work as well",
    )

    @field_validator("api_keys", "admin_key", "pinned_experts", "cors_origins", "source_urls", mode="before")
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

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(f"{origin!r} is no origin; write scheme://host[:port] without a path, or *")
        return value

    @field_validator("collect_seconds")
    @classmethod
    def _seldom(cls, value: float) -> float:
        if 0 < value < _OFTEN_SECONDS:
            raise ValueError(f"{value:g} s is too often; write {_OFTEN_SECONDS:g} or more, or 0 for never")
        return value

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
