"""Answers of `/v1/responses`; `routing` is our addition."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ConfigDict, Field

from service.api.wire.answers import Answer, RoutingAnswer, TokenLogprob
from service.api.wire.documented import UNROUTED

ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputText(Answer):
    """The one part of a message."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = Field(default=[])
    logprobs: list[TokenLogprob] = Field(default=[])


class MessageOutput(Answer):
    """What the model says."""

    id: str
    type: Literal["message"] = "message"
    status: ItemStatus
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class CallOutput(Answer):
    """A function that it calls."""

    id: str
    type: Literal["function_call"] = "function_call"
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


class ResponseUsage(Answer):
    """Token counts."""

    input_tokens: int
    input_tokens_details: Mapping[str, int]
    output_tokens: int
    output_tokens_details: Mapping[str, int]
    total_tokens: int


class ResponseFault(Answer):
    """Why a response failed; `type` is this server's own code."""

    code: str
    message: str
    type: str
    param: str | None


class IncompleteDetails(Answer):
    """Why a response was cut."""

    reason: Literal["max_output_tokens"]


_EXAMPLE: dict[str, Any] = {
    "id": "resp_5f1d",
    "object": "response",
    "created_at": 1767225600,
    "completed_at": 1767225601,
    "status": "completed",
    "background": False,
    "error": None,
    "incomplete_details": None,
    "instructions": "Be brief.",
    "max_output_tokens": None,
    "model": "shared",
    "output": [
        {
            "id": "msg_9c0e",
            "type": "message",
            "status": "completed",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "Hello.", "annotations": [], "logprobs": []}],
        }
    ],
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "reasoning": {"effort": None, "summary": None},
    "service_tier": "default",
    "store": False,
    "temperature": 1.0,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "top_p": 1.0,
    "truncation": "disabled",
    "usage": {
        "input_tokens": 12,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 3,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 15,
    },
    "user": None,
    "metadata": {},
    "routing": UNROUTED,
}


class ResponseAnswer(Answer):
    """A response, also while it is made."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE]})

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: Literal[False] = False
    error: ResponseFault | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    model: str
    output: list[MessageOutput | CallOutput] = Field(default=[])
    parallel_tool_calls: bool
    previous_response_id: None = None
    reasoning: Mapping[str, None] = {"effort": None, "summary": None}
    service_tier: Literal["default"] = "default"
    store: Literal[False] = False
    temperature: float
    text: Mapping[str, Any]
    tool_choice: str | Mapping[str, str]
    tools: list[Mapping[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    user: str | None
    metadata: Mapping[str, str]
    routing: RoutingAnswer | None = None
