"""Links of the OpenAPI document: what an answer lets a client ask next, and with which of its values."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Link:
    """From one operation's good answer to another operation.

    Attributes:
        source, target: method and path.
        parameters, body: of the target's request, as OpenAPI's runtime expressions.
        status: of the good answer that has it, where there are several.
    """

    name: str
    source: tuple[str, str]
    target: tuple[str, str]
    parameters: Mapping[str, str] = field(default_factory=dict)
    body: Mapping[str, Any] | None = None
    status: str = "2"


_COMPLETIONS = ("post", "/v1/completions")
_CHAT = ("post", "/v1/chat/completions")
_FEEDBACK = ("post", "/v1/feedback")
_MODEL = ("get", "/v1/models/{name}")
_EXPERT = "/admin/experts/{name}"
_JOB = "/admin/jobs/{job}"
_ALIAS = "/admin/aliases/{alias}"
_EXPERTS = ("get", "/admin/experts")
_REGISTER = ("post", "/admin/experts")
_RATED = {"request_id": "$response.body#/id", "reward": 1}
_ASKED = {"model": "$response.body#/data/0/id", "prompt": "How is planet spelled?", "max_tokens": 4}

LINKS = (
    Link("Retrieve", ("get", "/v1/models"), _MODEL, {"name": "$response.body#/data/0/id"}),
    Link("Complete", ("get", "/v1/models"), _COMPLETIONS, body=_ASKED),
    Link("Rate", _COMPLETIONS, _FEEDBACK, body=_RATED),
    Link("RateChat", _CHAT, _FEEDBACK, body=_RATED),
    Link(
        "UseGates",
        ("post", "/v1/route"),
        _COMPLETIONS,
        body={
            "model": "$response.body#/model",
            "gates": "$response.body#/data/0/gates",
            "prompt": "How is planet spelled?",
            "max_tokens": 4,
        },
    ),
    Link(
        "Detokenize",
        ("post", "/tokenize"),
        ("post", "/detokenize"),
        body={"tokens": "$response.body#/tokens"},
    ),
    Link(
        "Tokenize", ("post", "/detokenize"), ("post", "/tokenize"), body={"prompt": "$response.body#/prompt"}
    ),
    Link("Show", _REGISTER, ("get", _EXPERT), {"name": "$response.body#/name"}, status="201"),
    Link("Retire", _REGISTER, ("delete", _EXPERT), {"name": "$response.body#/name"}, status="201"),
    Link("Look", _REGISTER, ("get", _JOB), {"job": "$response.body#/id"}, status="202"),
    Link("Follow", _REGISTER, ("get", f"{_JOB}/events"), {"job": "$response.body#/id"}, status="202"),
    Link("Cancel", _REGISTER, ("post", f"{_JOB}/cancel"), {"job": "$response.body#/id"}, status="202"),
    Link("LookListed", ("get", "/admin/jobs"), ("get", _JOB), {"job": "$response.body#/data/0/id"}),
    Link("Retry", ("get", "/admin/jobs"), ("post", f"{_JOB}/retry"), {"job": "$response.body#/data/0/id"}),
    Link("ShowListed", _EXPERTS, ("get", _EXPERT), {"name": "$response.body#/data/0/name"}),
    Link("Generations", _EXPERTS, ("get", f"{_EXPERT}/generations"), {"name": "$response.body#/data/0/name"}),
    Link(
        "Generation",
        ("get", f"{_EXPERT}/generations"),
        ("get", f"{_EXPERT}/generations/{{generation}}"),
        {"name": "$response.body#/data/0/name", "generation": "$response.body#/data/0/generation"},
    ),
    Link(
        "Pin",
        ("get", _EXPERT),
        ("post", f"{_EXPERT}/pin"),
        {"name": "$response.body#/name"},
        {"generation": "$response.body#/generation"},
    ),
    Link("ShowAlias", ("put", _ALIAS), ("get", _ALIAS), {"alias": "$response.body#/alias"}),
    Link("RemoveAlias", ("put", _ALIAS), ("delete", _ALIAS), {"alias": "$response.body#/alias"}),
    Link(
        "Unload",
        ("post", "/v1/load_lora_adapter"),
        ("post", "/v1/unload_lora_adapter"),
        body={"lora_name": "$request.body#/lora_name"},
    ),
)


def add_links(document: dict[str, Any]) -> None:
    """Add every link whose two operations the document has."""
    paths = document.get("paths", {})
    for link in LINKS:
        source, target = (paths.get(path, {}).get(method) for method, path in (link.source, link.target))
        if source is None or target is None:
            continue
        told: dict[str, Any] = {"operationId": target["operationId"]}
        if link.parameters:
            told["parameters"] = dict(link.parameters)
        if link.body is not None:
            told["requestBody"] = dict(link.body)
        good = next(
            answer for status, answer in source["responses"].items() if status.startswith(link.status)
        )
        good.setdefault("links", {})[link.name] = told
