"""`POST /v1/route`: what the router would choose, without generating."""

from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from service.api.wire.base import WireModel
from service.api.wire.chat import Messages
from service.api.wire.completions import Prompt
from service.api.wire.request import ModelName, RoutingOptions


def _chats(value: Any) -> Any:
    """One chat, or a list of chats → a list of chats."""
    return [value] if isinstance(value, list) and value and isinstance(value[0], dict) else value


class RouteBody(WireModel):
    """One or more inputs: `prompt` as for completions, or `messages` (one chat, or a list of chats)."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"prompt": ["How is zebra spelled?", "Conjugate walk"]},
                {
                    "messages": [{"role": "user", "content": "Conjugate walk"}],
                    "routing": {"top_k": 2, "temperature": 2.0},
                },
            ]
        }
    )

    model: ModelName | None = None
    prompt: Prompt | None = None
    messages: (
        Annotated[list[Messages], Field(min_length=1, fail_fast=True), BeforeValidator(_chats)] | None
    ) = None
    routing: RoutingOptions | None = None

    @model_validator(mode="after")
    def _one_input(self) -> "RouteBody":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either 'prompt' or 'messages'")
        return self
