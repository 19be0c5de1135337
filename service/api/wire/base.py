"""How strictly a body is read: exact types, no unknown fields, nothing ignored in silence.

`null` means "not given" for every known field, as OpenAI's clients send it. A field that other servers
know and this one does not is accepted at its neutral value alone (`Neutral`), where ignoring it is right.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

UNKNOWN_FIELD = "unknown_field"
UNSUPPORTED_FIELD = "unsupported_field"

Neutral = Mapping[str, tuple[Any, ...]]
"""Known but unsupported field → the values besides null that ask for nothing."""


def _same(value: Any, neutral: Any) -> bool:
    """Equal as JSON: `0` is `0.0`, but neither is `false`."""
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)


class WireModel(BaseModel):
    """Base of every request body and of the objects inside."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    unsupported: ClassVar[Neutral] = {}

    @model_validator(mode="before")
    @classmethod
    def _known_fields_only(cls, data: Any) -> Any:
        """Drop nulls and neutral values; stop at the first field that is unknown or unsupported."""
        if not isinstance(data, dict):
            return data
        kept: dict[str, Any] = {}
        for name, value in data.items():
            if name in cls.model_fields:
                if value is not None:
                    kept[name] = value
            elif name not in cls.unsupported:
                raise PydanticCustomError(UNKNOWN_FIELD, "unknown field {name}", {"name": name[:64]})
            elif value is not None and not any(_same(value, neutral) for neutral in cls.unsupported[name]):
                raise PydanticCustomError(UNSUPPORTED_FIELD, "unsupported field {name}", {"name": name})
        return kept
