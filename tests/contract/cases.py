"""What all clients are asked for: a shape to answer in and a tool to call, which random weights can fill in."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Weather(BaseModel):
    """A small answer; every member is bounded, so that no model can go on for ever."""

    model_config = ConfigDict(extra="forbid")

    sky: Literal["clear", "cloudy", "rain"]
    degrees: int = Field(ge=-50, le=50)
    windy: bool


class Brief(BaseModel):
    """A smaller one, where nothing but white space can make an answer long."""

    model_config = ConfigDict(extra="forbid")

    clear: bool


TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "enum": ["Paris", "Rome"]},
                "days": {"enum": [1, 2, 3]},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}

QUESTION = [{"role": "user", "content": "What is the weather in Rome?"}]


def check_arguments(arguments: dict[str, Any]) -> None:
    """They fit the tool."""
    assert arguments.keys() == {"city", "days"}
    assert arguments["city"] in ("Paris", "Rome")
    assert arguments["days"] in (1, 2, 3)
