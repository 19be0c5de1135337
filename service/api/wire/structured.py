"""Fields that say what an answer must look like: OpenAI's `response_format`, vLLM's newer and older ones."""

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PlainValidator, StringConstraints, WithJsonSchema, model_validator

from service.api.wire.base import Neutral, WireModel, at_fault
from service.core import Constraint

SCHEMA_NAME = r"^[a-zA-Z0-9_-]{1,64}$"


def _schema(value: Any) -> str:
    """A JSON Schema, as an object or its JSON text → its JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"must be a JSON Schema, but is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError("must be a JSON Schema, an object")
    return json.dumps(value, ensure_ascii=False)


def _choices(value: Any) -> tuple[str, ...]:
    """A list of different strings, none of them empty."""
    if not isinstance(value, list) or not value or not all(isinstance(item, str) and item for item in value):
        raise ValueError("must be a list of strings, none of them empty")
    if len(set(value)) < len(value):
        raise ValueError("names a choice twice")
    return tuple(value)


JsonSchema = Annotated[str, PlainValidator(_schema), WithJsonSchema({"type": "object"})]
"""Kept as text, which is what a constraint holds."""

LooseSchema = Annotated[
    str,
    PlainValidator(_schema),
    WithJsonSchema(
        {"anyOf": [{"type": "object"}, {"type": "string", "contentMediaType": "application/json"}]}
    ),
]
"""The same, where clients send the text as well."""

Choices = Annotated[
    tuple[str, ...],
    PlainValidator(_choices),
    WithJsonSchema(
        {
            "type": "array",
            "items": {"type": "string", "minLength": 1},
            "minItems": 1,
            "uniqueItems": True,
        }
    ),
]
Definition = Annotated[str, StringConstraints(min_length=1)]


class SchemaFormat(WireModel):
    """OpenAI's wrapping of a JSON Schema."""

    name: Annotated[str, StringConstraints(pattern=SCHEMA_NAME)]
    description: str | None = Field(default=None, description="for people; the model does not read it")
    definition: JsonSchema = Field(
        alias="schema", description="a JSON Schema; what is not supported is refused"
    )
    strict: bool | None = Field(default=None, description="answers are held to the schema in any case")


class ResponseFormat(WireModel):
    """OpenAI's field."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None

    @model_validator(mode="after")
    def _schema_of_its_type(self) -> "ResponseFormat":
        if self.type == "json_schema" and self.json_schema is None:
            raise at_fault("json_schema", "is required where type is json_schema")
        if self.type != "json_schema" and self.json_schema is not None:
            raise at_fault("json_schema", "is for type json_schema alone")
        return self

    def constraint(self, param: str) -> Constraint | None:
        """What it asks for; `param` is where it stands."""
        if self.json_schema is not None:
            return Constraint("json_schema", self.json_schema.definition, f"{param}.json_schema.schema")
        return Constraint("json_object", "", param) if self.type == "json_object" else None


class StructuredOutputs(WireModel):
    """vLLM's field: exactly one of its kinds."""

    unsupported: ClassVar[Neutral] = {
        "disable_additional_properties": (False,),
        "disable_any_whitespace": (False,),
        "disable_fallback": (True, False),
        "structural_tag": (),
        "whitespace_pattern": (),
    }

    schema_text: LooseSchema | None = Field(default=None, alias="json", description="a JSON Schema")
    regex: Definition | None = Field(
        default=None, description="matched from beginning to end; without look-around and back references"
    )
    choice: Choices | None = Field(default=None, description="one of these strings")
    grammar: Definition | None = Field(
        default=None, description="GBNF (root ::= …), or Lark as llguidance reads it (start: …)"
    )
    json_object: bool | None = Field(default=None, description="true: any JSON object")

    @model_validator(mode="after")
    def _one_kind(self) -> "StructuredOutputs":
        given = _given(self.schema_text, self.regex, self.choice, self.grammar, self.json_object or None)
        if given != 1:
            raise ValueError(
                f"must have exactly one of json, regex, choice, grammar, json_object; it has {given}"
            )
        return self

    def constraint(self, param: str) -> Constraint:
        """What it asks for; `param` is where it stands."""
        found = _constraint(
            (f"{param}.json", self.schema_text),
            (f"{param}.regex", self.regex),
            (f"{param}.choice", self.choice),
            (f"{param}.grammar", self.grammar),
        )
        return found or Constraint("json_object", "", f"{param}.json_object")


class StructuredFields(WireModel):
    """Part of every body that generates: at most one of its fields."""

    response_format: ResponseFormat | None = Field(
        default=None,
        description="OpenAI's: json_object, or json_schema with a schema that the answer validates against",
        examples=[
            {"type": "json_object"},
            {
                "type": "json_schema",
                "json_schema": {
                    "name": "person",
                    "schema": {
                        "type": "object",
                        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
                        "required": ["name", "age"],
                        "additionalProperties": False,
                    },
                },
            },
        ],
    )
    structured_outputs: StructuredOutputs | None = Field(
        default=None,
        description="vLLM's: exactly one of json, regex, choice, grammar, json_object",
        examples=[{"choice": ["positive", "negative"]}, {"regex": "[0-9]{4}-[0-9]{2}"}],
    )
    guided_json: LooseSchema | None = Field(default=None, description="vLLM's older structured_outputs.json")
    guided_regex: Definition | None = Field(default=None, description="structured_outputs.regex")
    guided_choice: Choices | None = Field(default=None, description="structured_outputs.choice")
    guided_grammar: Definition | None = Field(default=None, description="structured_outputs.grammar")

    @model_validator(mode="after")
    def _one_constraint(self) -> "StructuredFields":
        given = [
            name
            for name in (
                "structured_outputs",
                "guided_json",
                "guided_regex",
                "guided_choice",
                "guided_grammar",
            )
            if getattr(self, name) is not None
        ]
        if self.response_format is not None and self.response_format.type != "text":
            given.insert(0, "response_format")
        if len(given) > 1:
            raise at_fault(given[1], f"cannot be sent together with {given[0]}; an answer has one form")
        return self

    def constraint(self) -> Constraint | None:
        """What the answer must look like; None leaves it free."""
        if self.structured_outputs is not None:
            return self.structured_outputs.constraint("structured_outputs")
        formatted = self.response_format.constraint("response_format") if self.response_format else None
        return formatted or _constraint(
            ("guided_json", self.guided_json),
            ("guided_regex", self.guided_regex),
            ("guided_choice", self.guided_choice),
            ("guided_grammar", self.guided_grammar),
        )


def _given(*values: object) -> int:
    return sum(value is not None for value in values)


def _constraint(
    schema: tuple[str, str | None],
    regex: tuple[str, str | None],
    choice: tuple[str, tuple[str, ...] | None],
    grammar: tuple[str, str | None],
) -> Constraint | None:
    """The one that is given, each with the name of its field."""
    if schema[1] is not None:
        return Constraint("json_schema", schema[1], schema[0])
    if regex[1] is not None:
        return Constraint("regex", regex[1], regex[0])
    if choice[1] is not None:
        return Constraint("choice", json.dumps(choice[1], ensure_ascii=False), choice[0])
    if grammar[1] is not None:
        return Constraint("grammar", grammar[1], grammar[0])
    return None
