from typing import Any

import pytest
from pydantic import ValidationError

from service.api.wire.admin import RegisterBody
from service.api.wire.chat import ChatBody
from service.api.wire.completions import CompletionBody, parse_prompt
from service.api.wire.routing import RouteBody


@pytest.mark.parametrize(
    ("value", "prompts"),
    [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1], [2, 3]], ((1,), (2, 3))),
    ],
)
def test_the_four_forms_of_a_prompt(value: Any, prompts: tuple[Any, ...]) -> None:
    assert parse_prompt(value) == prompts


@pytest.mark.parametrize("model", [CompletionBody, ChatBody])
def test_null_means_not_given_for_every_known_field(model: type[CompletionBody] | type[ChatBody]) -> None:
    body: dict[str, Any] = dict.fromkeys((*model.model_fields, *model.unsupported))
    body |= {"model": "m", "prompt": "p"} if model is CompletionBody else {"model": "m", "messages": [USER]}
    read = model.model_validate(body)
    assert (read.n, read.temperature, read.stop, read.gates) == (1, 1.0, (), None)


USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize("model", [CompletionBody, ChatBody])
def test_no_field_is_both_supported_and_not(model: type[CompletionBody] | type[ChatBody]) -> None:
    assert not model.model_fields.keys() & model.unsupported.keys()


@pytest.mark.parametrize("model", [CompletionBody, ChatBody])
def test_every_neutral_value_passes_and_false_is_not_zero(
    model: type[CompletionBody] | type[ChatBody],
) -> None:
    least: dict[str, Any] = {"model": "m", "prompt": "p"}
    if model is ChatBody:
        least = {"model": "m", "messages": [USER]}
    for name, values in model.unsupported.items():
        for value in values:
            model.model_validate({**least, name: value})
        if False in values and 0 not in [v for v in values if not isinstance(v, bool)]:
            with pytest.raises(ValidationError):
                model.model_validate({**least, name: 0})


@pytest.mark.parametrize("temperature", [0, 0.0, 1e-5, 2])
def test_a_temperature_is_zero_or_large_enough_to_divide_by(temperature: float) -> None:
    assert CompletionBody.model_validate({"model": "m", "prompt": "p", "temperature": temperature})
    with pytest.raises(ValidationError, match="must be 0, which is greedy, or at least 1e-05"):
        CompletionBody.model_validate({"model": "m", "prompt": "p", "temperature": 9.9e-6})


LEAST: dict[str, Any] = {"model": "m", "prompt": "p"}


@pytest.mark.parametrize(
    ("value", "biases"), [({}, {}), ({"0": 1}, {0: 1.0}), ({"12": -100, "7": 0.5}, {12: -100.0, 7: 0.5})]
)
def test_a_logit_bias_is_read_as_token_ids(value: Any, biases: dict[int, float]) -> None:
    assert CompletionBody.model_validate({**LEAST, "logit_bias": value}).logit_bias == biases


@pytest.mark.parametrize(
    "value",
    [
        {"": 1},
        {"01": 1},
        {"-1": 1},
        {"+1": 1},
        {" 1": 1},
        {"1.0": 1},
        {"٣": 1},
        {"1\n": 1},
        {"9" * 5000: 1},
        {"the": 1},
        {"1": 100.5},
        {"1": -101},
        {"1": 10**400},
        {"1": "5"},
        {"1": True},
        {"1": None},
        [1],
        "1",
        {str(token): 1 for token in range(1025)},
    ],
)
def test_what_is_no_logit_bias_is_refused(value: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        CompletionBody.model_validate({**LEAST, "logit_bias": value})
    assert caught.value.error_count() == 1


@pytest.mark.parametrize(
    ("fields", "reported", "of_the_prompt"),
    [
        ({}, None, None),
        ({"echo": True}, None, None),
        ({"logprobs": 0}, 0, None),
        ({"logprobs": 5}, 5, None),
        ({"logprobs": 5, "echo": True}, 5, 5),
    ],
)
def test_a_completion_reports_what_it_is_asked_for(
    fields: dict[str, Any], reported: int | None, of_the_prompt: int | None
) -> None:
    body = CompletionBody.model_validate({**LEAST, **fields})
    assert (body.reported, body.prompt_reported) == (reported, of_the_prompt)


@pytest.mark.parametrize(
    ("fields", "reported"),
    [
        ({}, None),
        ({"logprobs": False}, None),
        ({"top_logprobs": 0}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 3}, 3),
    ],
)
def test_a_chat_reports_what_it_is_asked_for(fields: dict[str, Any], reported: int | None) -> None:
    body = ChatBody.model_validate({"model": "m", "messages": [USER], **fields})
    assert (body.reported, body.prompt_reported) == (reported, None)


@pytest.mark.parametrize("model", [CompletionBody, ChatBody])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("priority", 2**31),
        ("priority", -(2**31) - 1),
        ("priority", 1.0),
        ("priority", True),
        ("timeout", 0),
        ("timeout", -1),
        ("timeout", "5"),
        ("timeout", True),
        ("timeout", float("inf")),
        ("logprobs", -1),
        ("logprobs", "1"),
    ],
)
def test_what_is_out_of_bounds_is_refused_by_name(
    model: type[CompletionBody] | type[ChatBody], field: str, value: Any
) -> None:
    least = LEAST if model is CompletionBody else {"model": "m", "messages": [USER]}
    with pytest.raises(ValidationError) as caught:
        model.model_validate({**least, field: value})
    assert [error["loc"] for error in caught.value.errors()] == [(field,)]


def test_text_parts_are_joined_by_newlines() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = ChatBody.model_validate({"model": "m", "messages": [{"role": "user", "content": parts}]})
    assert body.messages[0].content == "a\nb"


def test_one_chat_becomes_a_list_of_one() -> None:
    one = RouteBody.model_validate({"messages": [USER]})
    assert one == RouteBody.model_validate({"messages": [[USER]]})


def test_a_body_with_a_million_mistakes_reports_one() -> None:
    for body in (
        {"model": "m", "messages": [5] * 100_000},
        {"model": "m", "messages": [USER], **{f"x{i}": i for i in range(100_000)}},
        {"model": "m", "messages": [USER], "gates": {f"x{i}": "y" for i in range(100_000)}},
    ):
        with pytest.raises(ValidationError) as caught:
            ChatBody.model_validate(body)
        assert caught.value.error_count() == 1


@pytest.mark.parametrize("name", ["a\n", ".hidden", "-x", "a b", "é", "a/../b", "x" * 65])
def test_an_expert_name_is_safe_as_folder_label_and_model(name: str) -> None:
    with pytest.raises(ValidationError):
        RegisterBody.model_validate({"name": name, "path": "p"})


@pytest.mark.parametrize("model", [CompletionBody, ChatBody, RouteBody, RegisterBody])
def test_every_body_has_a_json_schema(model: Any) -> None:
    schema = model.model_json_schema()
    assert schema["additionalProperties"] is False
    assert schema["properties"]
