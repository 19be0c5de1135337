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
FIELD_AT_FAULT = "field_at_fault"

Neutral = Mapping[str, tuple[Any, ...]]
"""Known but unsupported field → the values besides null that ask for nothing."""


def at_fault(name: str, message: str) -> PydanticCustomError:
    """For a validator of a whole body: what is wrong with one of its fields.

    Args:
        name: of the field.
        message: what follows its name and a colon.
    """
    # A template of pydantic's own would read braces in the message.
    return PydanticCustomError(FIELD_AT_FAULT, "{message}", {"name": name, "message": message})


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
        # By alias, where a field's own name would hide a method of pydantic's.
        known = {field.alias or name for name, field in cls.model_fields.items()}
        for name, value in data.items():
            if name in known:
                if value is not None:
                    kept[name] = value
            elif name not in cls.unsupported:
                raise PydanticCustomError(UNKNOWN_FIELD, "unknown field {name}", {"name": name[:64]})
            elif value is not None and not any(_same(value, neutral) for neutral in cls.unsupported[name]):
                raise PydanticCustomError(UNSUPPORTED_FIELD, "unsupported field {name}", {"name": name})
        return kept
