from typing import Any

import openai
import pytest

from tests.api.harness import Served, counts, error_of

USER = {"role": "user", "content": "Add 1 and 2."}


def chat(server: Served, messages: list[dict[str, Any]], **body: Any) -> dict[str, Any]:
    answer = server.post("/v1/chat/completions", {"model": "tiny", "messages": messages, **body})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_an_openai_client_gets_a_turn_with_usage_and_routing(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Add 1 and 2."}], max_completion_tokens=5
    )
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 5
    assert answer.model_dump()["routing"]["gates"] == {"alpha": 1.0}


def test_a_chat_is_the_rendered_template_completed(server: Served) -> None:
    messages = [{"role": "system", "content": "Be brief."}, USER]
    ids = server.runtime.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    turn = chat(server, messages, max_tokens=8, temperature=0)
    completion = server.complete(prompt=list(ids), max_tokens=8, temperature=0)
    assert turn["choices"][0]["message"] == {"role": "assistant", "content": completion["choices"][0]["text"]}
    assert counts(turn) == counts(completion)


def test_text_parts_and_the_developer_role_are_plain_text_and_system(server: Served) -> None:
    parts = [{"type": "text", "text": "Add 1"}, {"type": "text", "text": "and 2."}]
    plain = chat(
        server,
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Add 1\nand 2."}],
        max_tokens=4,
        temperature=0,
    )
    same = chat(
        server,
        [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}],
        max_tokens=4,
        temperature=0,
    )
    assert same["choices"] == plain["choices"]
    assert counts(same) == counts(plain)


def test_a_chat_without_max_tokens_takes_what_fits(server: Served) -> None:
    answer = chat(server, [USER], ignore_eos=True)
    assert answer["usage"]["total_tokens"] == server.runtime.max_context


def test_max_tokens_and_max_completion_tokens_may_only_agree(server: Served) -> None:
    assert chat(server, [USER], max_tokens=2, max_completion_tokens=2)["usage"]["completion_tokens"] <= 2
    body = {"model": "tiny", "messages": [USER], "max_tokens": 2, "max_completion_tokens": 3}
    answer = server.post("/v1/chat/completions", body)
    assert answer.status_code == 400
    assert error_of(answer)["param"] == "max_completion_tokens"


@pytest.mark.parametrize(
    ("messages", "param", "code"),
    [
        ([], "messages", "invalid_request"),
        ("hello", "messages", "invalid_request"),
        ([{"role": "user"}], "messages[0].content", "invalid_request"),
        ([{"role": "oracle", "content": "1"}], "messages[0].role", "invalid_request"),
        ([{"role": "tool", "content": "1"}], "messages[0].tool_call_id", "invalid_request"),
        ([{**USER, "tool_call_id": "1"}], "messages[0].tool_call_id", "invalid_request"),
        ([{"role": "assistant", "content": None}], "messages[0].content", "invalid_request"),
        ([{"role": "user", "content": 5}], "messages[0].content", "invalid_request"),
        ([{"role": "user", "content": []}], "messages[0].content", "invalid_request"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "messages[0].content[0].type",
            "unsupported_parameter",
        ),
        ([USER, {**USER, "name": ""}], "messages[1].name", "invalid_request"),
        ([{**USER, "colour": "red"}], "messages[0].colour", "invalid_request"),
        (
            [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}],
            "messages[0].tool_calls[0].function",
            "invalid_request",
        ),
    ],
)
def test_bad_messages_are_refused_with_their_place(
    server: Served, messages: Any, param: str, code: str
) -> None:
    answer = server.post("/v1/chat/completions", {"model": "tiny", "messages": messages})
    assert answer.status_code == 400
    error = error_of(answer)
    assert error["param"] == param
    assert error["code"] == code


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("functions", [{"name": "f"}]),
        ("modalities", ["audio"]),
        ("audio", {"voice": "x"}),
        ("chat_template", "{{ 1 }}"),
        ("reasoning_effort", "high"),
    ],
)
def test_unsupported_fields_are_refused_unless_neutral(server: Served, field: str, value: Any) -> None:
    answer = server.post("/v1/chat/completions", {"model": "tiny", "messages": [USER], field: value})
    assert answer.status_code == 400
    error = error_of(answer)
    assert error["code"] == "unsupported_parameter"
    assert error["param"] == field


def test_neutral_values_of_unsupported_fields_are_accepted(server: Served) -> None:
    neutral: dict[str, Any] = {
        "tools": [],
        "tool_choice": "none",
        "parallel_tool_calls": True,
        "response_format": {"type": "text"},
        "logprobs": False,
        "top_logprobs": 0,
        "logit_bias": {},
        "modalities": ["text"],
        "store": False,
        "metadata": {},
    }
    chat(server, [{**USER, "name": None}], max_tokens=1, **neutral)


def rendered(server: Served, **body: Any) -> str:
    """The prompt that a chat becomes."""
    told = chat(server, max_tokens=1, return_token_ids=True, **body)
    return str(server.runtime.tokenizer.decode(told["prompt_token_ids"]))


def test_tools_that_may_not_be_called_need_no_template_that_shows_them(server: Served) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    body = {"model": "tiny", "messages": [USER], "max_tokens": 4, "temperature": 0}
    with_tools = server.post("/v1/chat/completions", {**body, "tools": tools, "tool_choice": "none"})
    assert with_tools.status_code == 200, with_tools.text
    plain = server.post("/v1/chat/completions", body)
    assert with_tools.json()["choices"][0]["message"] == plain.json()["choices"][0]["message"]
    callable_ = server.post("/v1/chat/completions", {**body, "tools": tools})
    assert callable_.status_code == 400
    assert error_of(callable_)["param"] == "tools"


def test_the_last_message_is_continued_or_the_next_one_opened(server: Served) -> None:
    begun = [USER, {"role": "assistant", "content": "It is"}]
    assert rendered(server, messages=begun, continue_final_message=True).endswith("assistant\nIt is")
    assert rendered(server, messages=[USER]).endswith("<|im_start|>assistant\n")
    assert rendered(server, messages=[USER], add_generation_prompt=False).endswith("2.<|im_end|>\n")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs.enable_thinking"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"chat_template_kwargs": {"a b": 1}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
    ],
)
def test_what_the_template_cannot_do_is_refused_by_name(
    server: Served, change: dict[str, Any], param: str
) -> None:
    answer = server.post("/v1/chat/completions", {"model": "tiny", "messages": [USER], **change})
    assert answer.status_code == 400
    assert str(error_of(answer)["param"]).startswith(param)
