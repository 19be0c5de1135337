import asyncio
import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field

from tests.api.harness import Served, error_of, eventually, serving
from tests.contract.family import contract_family
from tests.fixtures.tiny import TinyFamily

SAY = "What is the capital of this country?"
GREEDY: dict[str, Any] = {"model": "alpha", "temperature": 0, "max_output_tokens": 12}


class Weather(BaseModel):
    """Bounded in every member, so that random weights come to its end."""

    model_config = ConfigDict(extra="forbid")

    sky: Literal["clear", "cloudy"]
    degrees: int = Field(ge=0, le=9)


TOOL = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"enum": [1, 2, 3]}},
        "required": ["city", "days"],
        "additionalProperties": False,
    },
    "strict": True,
}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> TinyFamily:
    return contract_family(tmp_path_factory.mktemp("responses"))


@pytest.fixture(scope="module")
def server(family: TinyFamily) -> Iterator[Served]:
    with serving(family.bundle) as served:
        yield served


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def events(server: Served, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Of a stream that must start well, their names checked."""
    found = []
    with server.http.stream("POST", "/v1/responses", json={**body, "stream": True}) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line and not line.startswith(":")]
    for name, data in zip(lines[::2], lines[1::2], strict=True):
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def lasting(item: dict[str, Any]) -> dict[str, Any]:
    """An item or a response without what differs from one to the next."""
    gone = ("id", "created_at", "completed_at", "call_id", "usage")
    return {name: value for name, value in item.items() if name not in gone}


def test_a_response_says_what_a_chat_would(client: openai.OpenAI, server: Served) -> None:
    chat = client.chat.completions.create(
        model="alpha",
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": SAY}],
        temperature=0,
        max_completion_tokens=12,
    )
    answer = client.responses.create(input=SAY, instructions="Be brief.", metadata={"a": "b"}, **GREEDY)
    assert answer.output_text == chat.choices[0].message.content
    assert answer.id.startswith("resp_")
    assert answer.object == "response"
    assert answer.model == "alpha"
    assert answer.metadata == {"a": "b"}
    assert answer.usage is not None
    assert chat.usage is not None
    assert answer.usage.input_tokens == chat.usage.prompt_tokens
    assert answer.usage.output_tokens == chat.usage.completion_tokens
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert answer.usage.output_tokens_details.reasoning_tokens == 0
    told = answer.model_dump()
    assert told["store"] is False
    assert told["previous_response_id"] is None
    assert told["routing"]["gates"] == {"alpha": 1.0}
    assert told["routing"] == chat.model_dump()["routing"]
    [message] = answer.output
    assert message.type == "message"
    assert message.role == "assistant"


def test_a_response_that_is_cut_is_incomplete(client: openai.OpenAI) -> None:
    body = {**GREEDY, "max_output_tokens": 3}
    answer = client.responses.create(input=SAY, extra_body={"ignore_eos": True}, **body)
    assert answer.status == "incomplete"
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.output[0].status == "incomplete"
    assert answer.usage is not None
    assert answer.usage.output_tokens == 3


def test_a_stream_adds_up_to_the_whole_response(client: openai.OpenAI, server: Served) -> None:
    whole = client.responses.create(input=SAY, **GREEDY)
    made = events(server, {"input": SAY, **GREEDY})
    kinds = [event["type"].removeprefix("response.") for event in made]
    text = kinds.count("output_text.delta")
    assert text > 1
    assert kinds == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * text,
        "output_text.done",
        "content_part.done",
        "output_item.done",
        whole.status,
    ]
    assert made[0]["response"]["status"] == "in_progress"
    assert made[0]["response"]["output"] == []
    deltas = [event["delta"] for event in made if event["type"] == "response.output_text.delta"]
    [done] = [event for event in made if event["type"] == "response.output_text.done"]
    assert "".join(deltas) == done["text"] == whole.output_text
    last = made[-1]["response"]
    assert lasting(last["output"][0]) == lasting(whole.output[0].model_dump(exclude={"phase"}))
    assert {event["response"]["id"] for event in (made[0], made[1], made[-1])} == {last["id"]}
    assert last["usage"]["output_tokens"] == whole.usage.output_tokens


def test_the_clients_own_streams_read_it(client: openai.OpenAI, server: Served) -> None:
    schema = {"type": "json_schema", "name": "w", "schema": Weather.model_json_schema(), "strict": True}
    body = {**GREEDY, "max_output_tokens": 600, "input": SAY, "text": {"format": schema}}
    whole = client.responses.create(**body)
    assert whole.status == "completed"
    raw = list(client.responses.create(**body, stream=True))
    assert raw[-1].type == "response.completed"
    assert raw[-1].response.output_text == whole.output_text
    with client.responses.stream(**body) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert text == final.output_text == whole.output_text

    async def read() -> str:
        async with (
            openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made,
            made.responses.stream(**body) as stream,
        ):
            return (await stream.get_final_response()).output_text

    assert asyncio.run(read()) == whole.output_text


def test_a_response_is_parsed_into_the_shape_it_was_asked_for(client: openai.OpenAI) -> None:
    body = {**GREEDY, "max_output_tokens": 600}
    answer = client.responses.parse(input=SAY, text_format=Weather, **body)
    assert isinstance(answer.output_parsed, Weather)
    assert answer.text is not None
    assert answer.text.format.type == "json_schema"
    with client.responses.stream(input=SAY, text_format=Weather, **body) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_parsed == answer.output_parsed
    loose = client.responses.create(
        input=SAY, text={"format": {"type": "json_object"}}, **{**body, "max_output_tokens": 400}
    )
    if loose.status == "completed":
        assert isinstance(json.loads(loose.output_text), dict)


def test_functions_are_called_and_their_outputs_go_on(client: openai.OpenAI, server: Served) -> None:
    body = {**GREEDY, "max_output_tokens": 120, "tools": [TOOL], "tool_choice": "required"}
    answer = client.responses.create(input=SAY, parallel_tool_calls=False, **body)
    [call] = answer.output
    assert call.type == "function_call"
    assert call.name == "get_weather"
    assert json.loads(call.arguments)["city"] in ("Paris", "Rome")
    assert answer.status == "completed"
    made = events(server, {"input": SAY, "parallel_tool_calls": False, **body})
    kinds = [event["type"] for event in made]
    assert kinds[2] == "response.output_item.added"
    deltas = [e["delta"] for e in made if e["type"] == "response.function_call_arguments.delta"]
    assert "".join(deltas) == call.arguments
    assert kinds[-3:] == [
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert lasting(made[-1]["response"]["output"][0]) == lasting(call.model_dump(exclude_unset=True))
    named = {"type": "function", "name": "get_weather"}
    with client.responses.stream(
        input=SAY, parallel_tool_calls=False, **{**body, "tool_choice": named}
    ) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output[0].arguments == call.arguments
    talk = [
        {"role": "user", "content": SAY},
        *[item.model_dump(exclude_unset=True) for item in answer.output],
        {"type": "function_call_output", "call_id": call.call_id, "output": '{"sky": "clear"}'},
    ]
    after = client.responses.create(input=talk, **{**body, "tool_choice": "none"})
    said = client.chat.completions.create(
        model="alpha",
        temperature=0,
        max_completion_tokens=120,
        tools=[{"type": "function", "function": {n: v for n, v in TOOL.items() if n != "type"}}],
        tool_choice="none",
        messages=[
            {"role": "user", "content": SAY},
            {
                "role": "assistant",
                "tool_calls": [
                    {
                        "id": call.call_id,
                        "type": "function",
                        "function": {"name": call.name, "arguments": call.arguments},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": call.call_id, "content": '{"sky": "clear"}'},
        ],
    )
    assert after.output_text == said.choices[0].message.content
    assert after.usage.input_tokens == said.usage.prompt_tokens


def test_a_conversation_goes_on_with_what_was_answered(client: openai.OpenAI) -> None:
    first = client.responses.create(input=SAY, **GREEDY)
    talk = [
        {"role": "user", "content": [{"type": "input_text", "text": SAY}]},
        *[item.model_dump() for item in first.output],
        {"type": "message", "role": "user", "content": "And then?"},
    ]
    second = client.responses.create(input=talk, **GREEDY)
    chat = client.chat.completions.create(
        model="alpha",
        temperature=0,
        max_completion_tokens=12,
        messages=[
            {"role": "user", "content": SAY},
            {"role": "assistant", "content": first.output_text},
            {"role": "user", "content": "And then?"},
        ],
    )
    assert second.output_text == chat.choices[0].message.content


def test_log_probabilities_come_with_the_text(client: openai.OpenAI, server: Served) -> None:
    body = {**GREEDY, "include": ["message.output_text.logprobs"], "top_logprobs": 2}
    answer = client.responses.create(input=SAY, **body)
    part = answer.output[0].content[0]
    assert answer.usage is not None
    assert len(part.logprobs) == answer.usage.output_tokens
    assert all(len(score.top_logprobs) == 2 for score in part.logprobs)
    spelled = b"".join(bytes(score.bytes) for score in part.logprobs)
    assert spelled.decode(errors="replace").startswith(answer.output_text[:4])
    made = events(server, {"input": SAY, **body})
    [done] = [event for event in made if event["type"] == "response.output_text.done"]
    assert len(done["logprobs"]) == answer.usage.output_tokens


def test_gates_routing_and_names_are_as_everywhere(server: Served) -> None:
    body = {"input": SAY, "max_output_tokens": 2, "model": "tiny"}
    mixed = server.post("/v1/responses", {**body, "gates": {"alpha": 0.5, "beta": 0.25}})
    assert mixed.json()["routing"]["gates"] == {"alpha": 0.5, "beta": 0.25}
    assert mixed.headers["x-twinserve-pattern"] == mixed.json()["routing"]["pattern"]
    routed = server.post("/v1/responses", {**body, "routing": {"top_k": 1, "threshold": 0}}).json()
    assert len(routed["routing"]["gates"]) == 1
    assert routed["routing"]["router_generation"] == 1
    plain = server.post("/v1/responses", {**body, "model": "shared", "request_id": "mine"})
    assert plain.json()["routing"]["mode"] == "shared"
    assert plain.json()["id"] == "resp_mine"


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"input": []}, "input", "at least 1 item"),
        ({"input": [{"role": "user"}]}, "input[0].content", "an item of type message needs it"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "'function_call'"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input[0].summary", "Unknown field"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0].type",
            "not supported",
        ),
        ({"input": [{"type": "function_call", "name": "a"}]}, "input[0].call_id", "needs it"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "not supported"),
        ({"conversation": "conv_1"}, "conversation", "not supported"),
        ({"background": True}, "background", "not supported"),
        ({"store": True}, "store", "not supported"),
        ({"truncation": "auto"}, "truncation", "not supported"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort", "not supported"),
        ({"include": ["file_search_call.results"]}, "include", "not supported by this server"),
        ({"top_logprobs": 2}, "top_logprobs", "is for include"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "'function'"),
        ({"tools": [TOOL, TOOL]}, "tools", "defined twice"),
        ({"tool_choice": "required"}, "tool_choice", "send tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "no"}}, "tool_choice", "names no"),
        ({"text": {"format": {"type": "xml"}}}, "text.format", "json_schema"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format", "name and schema"),
        (
            {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": 5}}}},
            "text.format",
            "text.format",
        ),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater than or equal to 1"),
        ({"max_output_tokens": 4090}, "max_output_tokens", "lower max_output_tokens"),
        ({"max_output_tokens": 9999}, "max_output_tokens", "max_tokens"),
        ({"min_tokens": 4090}, "min_tokens", "lower min_tokens"),
        ({"input": "word " * 5000}, "input", "tokens"),
        ({"input": [{"role": "user", "content": "a"}] * 1025}, "input", "the limit is 1024 (max_messages)"),
        ({"n": 2}, "n", "Unknown field"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options", "stream = true"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_bodies_are_told_what_is_wrong(server: Served, body, param, says, stream) -> None:
    if stream and "stream_options" in body:
        pytest.skip("right in a stream")
    answer = server.post("/v1/responses", {"model": "alpha", "input": "hi", "stream": stream, **body})
    assert answer.status_code == 400, answer.text
    error = error_of(answer)
    assert error["param"] == param
    assert says in error["message"]


def test_what_asks_for_nothing_is_taken(server: Served) -> None:
    body = {
        "model": "alpha",
        "input": "hi",
        "max_output_tokens": 1,
        "store": False,
        "truncation": "disabled",
        "background": False,
        "reasoning": {"effort": None, "summary": None},
        "include": ["reasoning.encrypted_content"],
        "previous_response_id": None,
        "tools": [],
        "tool_choice": "auto",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "user": "u",
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
    }
    assert server.post("/v1/responses", body).status_code == 200


def test_a_client_that_hangs_up_frees_everything(server: Served) -> None:
    body = {"model": "alpha", "input": SAY, "max_output_tokens": 2000, "ignore_eos": True, "stream": True}
    with server.http.stream("POST", "/v1/responses", json=body) as answer:
        for line in answer.iter_lines():
            if "output_text.delta" in line:
                break
    assert eventually(lambda: server.metric("twinserve_num_requests_running") == 0)
    assert server.metric("twinserve_kv_blocks_used") == 0
