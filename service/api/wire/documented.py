"""Whole answers of the generating endpoints as the OpenAPI document tells them, with examples."""

from typing import Any

from pydantic import ConfigDict

from service.api.wire.answers import Generated

_ROUTED: dict[str, Any] = {
    "gates": {"spell": 1.0},
    "pattern": "spell@1:1",
    "mode": "factored",
    "generations": {"spell": 1},
    "router_generation": 1,
    "confidence": 0.98,
    "abstained": False,
    "explored": False,
}
UNROUTED: dict[str, Any] = {
    "gates": {},
    "pattern": "shared",
    "mode": "shared",
    "generations": {},
    "router_generation": None,
    "confidence": None,
    "abstained": False,
    "explored": False,
}
_USED: dict[str, Any] = {
    "prompt_tokens": 12,
    "completion_tokens": 9,
    "total_tokens": 21,
    "prompt_tokens_details": {"cached_tokens": 0},
}


class CompletionAnswer(Generated):
    """A whole answer of `/v1/completions`, for the document."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": "cmpl-5f1d",
                    "object": "text_completion",
                    "created": 1767225600,
                    "model": "embedded",
                    "choices": [
                        {
                            "index": 0,
                            "text": " P-L-A-N-E-T",
                            "logprobs": None,
                            "finish_reason": "stop",
                            "stop_reason": None,
                            "routing": _ROUTED,
                        }
                    ],
                    "usage": _USED,
                    "routing": _ROUTED,
                }
            ]
        }
    )


class ChatAnswer(Generated):
    """A whole answer of `/v1/chat/completions`, for the document."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": "chatcmpl-5f1d",
                    "object": "chat.completion",
                    "created": 1767225600,
                    "model": "embedded",
                    "choices": [
                        {
                            "index": 0,
                            "message": {"role": "assistant", "content": "P-L-A-N-E-T"},
                            "logprobs": None,
                            "finish_reason": "stop",
                            "stop_reason": None,
                            "routing": _ROUTED,
                        }
                    ],
                    "usage": _USED,
                    "routing": _ROUTED,
                }
            ]
        }
    )
