"""Bodies, headers and queries of `/admin`; what it answers is in `registry.py`."""

from typing import Annotated, Any, Literal

from fastapi import Header
from pydantic import ConfigDict, Field, StringConstraints, model_validator

from service.api.wire.base import WireModel, at_fault

Text = Annotated[str, StringConstraints(min_length=1)]
ExpertName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
GenerationNumber = Annotated[int, Field(ge=1, le=2**31 - 1)]

IfMatch = Annotated[
    str | None,
    Header(
        alias="If-Match",
        max_length=64,
        description='an ETag, `"3"`: go on only if that generation is the current one; else 412',
    ),
]
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=200,
        pattern=r"^[\x21-\x7e]+$",
        description="sent again with the same request it gives the same job; with another one 422",
    ),
]


class CanaryBody(WireModel):
    """A prompt that a new generation must answer as expected before it may serve."""

    prompt: Text
    expected: Text
    match: Literal["exact", "contains"] = Field(
        default="exact",
        description="the whole greedy answer, or a part of it; white space around it is nothing",
    )


class TrialSpec(WireModel):
    """How a generation is tried out beside the one that serves."""

    kind: Literal["canary", "shadow"] = Field(
        description="canary: it answers that share of routed requests; shadow: its router's gates are only compared"
    )
    percent: float = Field(gt=0, le=100, description="of routed requests")


class RegisterBody(WireModel):
    """An expert to register: from a folder on the server, an upload, or a URL.

    Attributes:
        path: a full fine-tune, LoRA or expert folder, relative to the configured root or absolute below it.
        upload: or the id of a finished upload.
        url: or a URL below one of TWINSERVE_SOURCE_URLS.
        rank: singular values kept of each matrix; neither rank nor energy is the bundle's own choice.
        energy: or the share of the squared singular values kept.
        prompts: inputs of the expert's kind, to route to it.
        canary_prompts: what it must answer before it may serve.
        canary_min_score: the share of those that must come out as expected.
        expected_generation: refuse unless this generation is the current one (compare and swap).
        replace: allow a new generation of an expert that exists.
        activate: false makes it ready and leaves what serves as it is.
        trial: try it out instead of switching to it.
        signature: detached Ed25519 signature of the source, base64.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"name": "sql", "path": "sql-lora", "prompts": ["List all users", "Count the orders"] * 4},
                {
                    "name": "sql",
                    "path": "sql-lora-2",
                    "expected_generation": 1,
                    "canary_prompts": [
                        {"prompt": "Count the orders", "expected": "SELECT", "match": "contains"}
                    ],
                    "trial": {"kind": "canary", "percent": 5},
                },
            ]
        }
    )

    name: ExpertName
    path: Annotated[str, StringConstraints(min_length=1, max_length=4096)] | None = None
    upload: Annotated[str, StringConstraints(min_length=1, max_length=128)] | None = None
    url: Annotated[str, StringConstraints(min_length=1, max_length=4096)] | None = None
    rank: int | None = Field(default=None, ge=1, le=65536)
    energy: float | None = Field(default=None, gt=0, le=1)
    prompts: Annotated[list[Text], Field(fail_fast=True)] = Field(default=[])
    canary_prompts: Annotated[list[CanaryBody], Field(fail_fast=True, max_length=64)] = Field(default=[])
    canary_min_score: float = Field(default=1.0, ge=0, le=1)
    expected_generation: GenerationNumber | None = None
    replace: bool = False
    activate: bool = True
    trial: TrialSpec | None = None
    signature: Annotated[str, StringConstraints(min_length=1, max_length=1024)] | None = None

    @model_validator(mode="after")
    def _one_of_each(self) -> "RegisterBody":
        given = [name for name in ("path", "upload", "url") if getattr(self, name) is not None]
        if not given:
            raise at_fault("path", "one of 'path', 'upload' and 'url' is required")
        if len(given) > 1:
            raise at_fault(given[1], f"send it or {given[0]!r}, not both")
        if self.rank is not None and self.energy is not None:
            raise ValueError("give either 'rank' or 'energy', not both")
        return self

    def size(self) -> dict[str, Any]:
        """The given one of rank and energy."""
        return {key: value for key in ("rank", "energy") if (value := getattr(self, key)) is not None}


class RollbackBody(WireModel):
    """Back to an older generation; the one that served before if none is named."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{}, {"generation": 1, "expected_generation": 2}]}
    )

    generation: GenerationNumber | None = None
    expected_generation: GenerationNumber | None = None


class CollectBody(WireModel):
    """What garbage collection leaves of an expert: its newest generations, as many as the server's setting says."""

    model_config = ConfigDict(json_schema_extra={"examples": [{}, {"keep": 4}]})

    keep: GenerationNumber | None = None


class ActivateBody(WireModel):
    """A ready generation to serve."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"generation": 2}]})

    generation: GenerationNumber
    expected_generation: GenerationNumber | None = None


class PinBody(WireModel):
    """A generation that registrations leave in place; the current one if none is named."""

    model_config = ConfigDict(json_schema_extra={"examples": [{}, {"generation": 1}]})

    generation: GenerationNumber | None = None
    expected_generation: GenerationNumber | None = None


class TrialBody(TrialSpec):
    """A ready generation to try out."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"generation": 2, "kind": "canary", "percent": 5}]}
    )

    generation: GenerationNumber
    expected_generation: GenerationNumber | None = None


class AliasBody(WireModel):
    """What an alias stands for."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"expert": "spell"}]})

    expert: ExpertName


class ReturnBody(WireModel):
    """Back to a bundle that served before.

    Attributes:
        absent: what becomes of experts that serve and came after it: they refuse the return, or are retired.
    """

    model_config = ConfigDict(json_schema_extra={"examples": [{}, {"absent": "retire"}]})

    absent: Literal["refuse", "retire"] = "refuse"


class BundleBody(WireModel):
    """A new shared expert over all current experts, or a bundle that `twinserve build` made of the same base.

    Attributes:
        merge: how to merge: `method` and its parameters, as for `twinserve build`; the bundle's own if not given.
        base: folder of the base, below the configured root; by default it is worked out from the bundle.
        prompts: expert → prompts that take the place of those it was registered with.
        path: or the folder of a bundle, below the configured root.
    """

    model_config = ConfigDict(
        json_schema_extra={"examples": [{}, {"merge": {"method": "task_arithmetic", "scale": 0.5}}]}
    )

    merge: dict[str, str | bool | int | float] | None = None
    base: Annotated[str, StringConstraints(min_length=1, max_length=4096)] | None = None
    prompts: dict[ExpertName, Annotated[list[Text], Field(fail_fast=True)]] | None = None
    path: Annotated[str, StringConstraints(min_length=1, max_length=4096)] | None = None

    @model_validator(mode="after")
    def _one_way(self) -> "BundleBody":
        others = [name for name in ("merge", "base", "prompts") if getattr(self, name) is not None]
        if self.path is not None and others:
            raise at_fault("path", f"is of a bundle that is built already; leave {others[0]!r} out")
        return self

    def asked(self) -> dict[str, Any]:
        """What was given, as JSON."""
        return self.model_dump(exclude_none=True)
