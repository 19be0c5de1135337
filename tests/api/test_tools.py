"""Tools over HTTP with the real client: shown to the model by its template, called, streamed, demanded."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.api.harness import Served, error_of, serving
from tests.fixtures.tiny import tiny_family

TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    'Answer <tool_call>\n{"name": <name>, "arguments": <object>}\n</tool_call><|im_end|>\n{% endif %}'
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
USER: Any = {"role": "user", "content": "Add 1 and 2."}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "sum",
            "parameters": {
                "type": "object",
                "properties": {
                    "a": {"type": "integer", "minimum": 0, "maximum": 9},
                    "sign": {"enum": ["+", "-"]},
                },
                "required": ["a", "sign"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 3, "sign": "+"}}\n</tool_call>'


@pytest.fixture(scope="module")
def tooled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A model whose template shows tools."""
    folder = tmp_path_factory.mktemp("tooled")
    made = tiny_family(folder, experts=("alpha", "beta"), template=TEMPLATE, context=1024)
    with serving(made.bundle) as served:
        yield served


@pytest.fixture(scope="module")
def tooled_client(tooled: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{tooled.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def ask(tooled: Served, **body: Any) -> dict[str, Any]:
    base = {"model": "shared", "messages": [USER], "tools": TOOLS, "max_tokens": 250, "temperature": 0}
    answer = tooled.post("/v1/chat/completions", {**base, **body})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_a_demanded_call_comes_and_its_arguments_fit_their_schema(tooled_client: openai.OpenAI) -> None:
    named: Any = {"type": "function", "function": {"name": "add"}}
    for seed in range(3):
        answer = tooled_client.chat.completions.create(
            model="tiny", messages=[USER], tools=TOOLS, tool_choice=named, max_tokens=120, seed=seed
        )
        [choice] = answer.choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        assert choice.message.tool_calls is not None
        [call] = choice.message.tool_calls
        assert call.type == "function"
        assert call.function.name == "add"
        arguments = json.loads(call.function.arguments)
        assert arguments.keys() == {"a", "sign"}
        assert 0 <= arguments["a"] <= 9
        assert arguments["sign"] in "+-"


def test_required_demands_one_of_them(tooled: Served) -> None:
    answer = ask(tooled, tool_choice="required", parallel_tool_calls=False, max_tokens=150)
    [choice] = answer["choices"]
    [call] = choice["message"]["tool_calls"]
    assert call["function"]["name"] in ("add", "now")
    json.loads(call["function"]["arguments"])


def test_a_streamed_call_is_the_whole_one_in_openais_pieces(tooled_client: openai.OpenAI) -> None:
    body: dict[str, Any] = {
        "model": "tiny", "messages": [USER], "tools": TOOLS, "max_tokens": 120, "seed": 4,
        "tool_choice": {"type": "function", "function": {"name": "add"}},
    }  # fmt: skip
    whole = tooled_client.chat.completions.create(**body)
    assert whole.choices[0].message.tool_calls is not None
    chunks = list(tooled_client.chat.completions.create(**body, stream=True))
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert deltas[0].index == 0
    assert deltas[0].id
    assert deltas[0].type == "function"
    assert deltas[0].function is not None
    assert deltas[0].function.name == "add"
    assert all(one.id is None and one.function and one.function.name is None for one in deltas[1:])
    assert len(deltas) > 3
    arguments = "".join(one.function.arguments or "" for one in deltas if one.function is not None)
    assert arguments == whole.choices[0].message.tool_calls[0].function.arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert not any(chunk.choices[0].delta.content for chunk in chunks)


def test_the_clients_own_stream_helper_puts_the_calls_together(tooled_client: openai.OpenAI) -> None:
    with tooled_client.chat.completions.stream(
        model="tiny",
        messages=[USER],
        tools=TOOLS,
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=150,
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].finish_reason == "tool_calls"
    assert final.choices[0].message.tool_calls


@pytest.mark.parametrize("several", [True, False])
def test_what_a_model_writes_of_itself_is_split_into_text_and_calls(tooled: Served, several: bool) -> None:
    said = f"So.\n{CALL}\n{CALL.replace('3', '4')}"
    body = {"structured_outputs": {"choice": [said]}, "parallel_tool_calls": several}
    [choice] = ask(tooled, **body)["choices"]
    assert choice["message"]["content"] == "So."
    calls = choice["message"]["tool_calls"]
    assert [json.loads(call["function"]["arguments"])["a"] for call in calls] == ([3, 4] if several else [3])
    assert len({call["id"] for call in calls}) == len(calls)
    assert choice["finish_reason"] == "tool_calls"


def test_tool_choice_none_leaves_the_text_as_it_is(tooled: Served) -> None:
    [choice] = ask(tooled, structured_outputs={"choice": [CALL]}, tool_choice="none")["choices"]
    assert choice["message"] == {"role": "assistant", "content": CALL}
    assert choice["finish_reason"] == "stop"


def test_a_call_that_is_cut_ends_for_its_length(tooled: Served) -> None:
    [choice] = ask(tooled, structured_outputs={"choice": [CALL]}, max_tokens=50)["choices"]
    assert choice["finish_reason"] == "length"
    [call] = choice["message"]["tool_calls"]
    assert '{"a": 3, "sign": "+"}'.startswith(call["function"]["arguments"])


def test_tools_calls_and_results_reach_the_prompt(tooled: Served) -> None:
    called = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 3}'}}
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "call_1", "name": "add", "content": [{"type": "text", "text": "5"}]},
    ]
    ids = ask(tooled, messages=messages, return_token_ids=True, max_tokens=1)["prompt_token_ids"]
    text = tooled.runtime.tokenizer.decode(ids)
    assert '{"type": "function", "function": {"name": "add", "description": "sum"' in text
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 3}}\n</tool_call><|im_end|>' in text
    assert "<|im_start|>tool\n5<|im_end|>" in text


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "tools"),
        ({"tools": TOOLS * 65}, "tools"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
            "tools[0].function.parameters",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]},
            "tools[0].function.parameters",
        ),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "nobody"}}}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tool_choice": "required", "tools": []}, "tool_choice"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": "[1]"}}]}]},
            "messages[1].tool_calls[0].function.arguments",
        ),
    ],
)  # fmt: skip
def test_bad_tools_are_refused_by_name(tooled: Served, change: dict[str, Any], param: str) -> None:
    body = {"model": "tiny", "messages": [USER], "tools": TOOLS, **change}
    answer = tooled.post("/v1/chat/completions", body)
    assert answer.status_code == 400, answer.text
    assert error_of(answer)["param"] == param


def test_a_schema_that_no_grammar_can_hold_is_refused(tooled: Served) -> None:
    bad = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=x)y"}}, "required": ["a"]}
    tools = [{"type": "function", "function": {"name": "f", "parameters": bad}}]
    body = {"model": "tiny", "messages": [USER], "tools": tools, "tool_choice": "required"}
    answer = tooled.post("/v1/chat/completions", body)
    assert answer.status_code == 400
    assert str(error_of(answer)["param"]).startswith("tools")


def test_a_model_whose_template_shows_no_tools_says_so(server: Served) -> None:
    answer = server.post("/v1/chat/completions", {"model": "tiny", "messages": [USER], "tools": TOOLS})
    assert answer.status_code == 400
    assert error_of(answer)["param"] == "tools"
    assert "template" in error_of(answer)["message"]
    called = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": [called]}]
    answer = server.post("/v1/chat/completions", {"model": "tiny", "messages": messages})
    assert answer.status_code == 400
    assert error_of(answer)["param"] == "messages[1].tool_calls"
