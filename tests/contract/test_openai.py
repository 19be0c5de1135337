"""The official client: plain, asynchronous, streamed; and that errors become its own exceptions."""

import asyncio
import json
from collections.abc import Iterator

import openai
import pytest

from tests.api.harness import Served
from tests.contract.cases import QUESTION, TOOL, Brief, Weather, check_arguments
from tests.contract.conftest import KEY, MESSAGES, PROMPT


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as made:
        yield made


def test_a_completion(client: openai.OpenAI, told: str) -> None:
    answer = client.completions.create(model="alpha", prompt=PROMPT, max_tokens=12, temperature=0)
    assert answer.choices[0].text == told
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.object == "text_completion"


def test_a_streamed_completion(client: openai.OpenAI, told: str) -> None:
    stream = client.completions.create(
        model="alpha",
        prompt=PROMPT,
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == told
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 0


def test_completions_of_several_prompts_with_log_probabilities(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="tiny",
        prompt=[PROMPT, "zebra"],
        n=2,
        max_tokens=4,
        logprobs=3,
        echo=True,
        seed=5,
        logit_bias={"40": -100},
        stop=["\n\n"],
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert all(choice.text.startswith((PROMPT, "zebra")) for choice in answer.choices)
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.tokens
        assert choice.logprobs.top_logprobs is not None
        assert len(choice.logprobs.tokens) == len(choice.logprobs.top_logprobs)


def test_a_chat(client: openai.OpenAI, said: str) -> None:
    answer = client.chat.completions.create(
        model="alpha",
        messages=MESSAGES,  # type: ignore[arg-type]
        max_completion_tokens=12,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == said
    assert answer.choices[0].logprobs is not None


def test_a_streamed_chat(client: openai.OpenAI, said: str) -> None:
    # The client's helper takes an answer that ends for its length as a failure.
    end = said[5:7]
    with client.chat.completions.stream(
        model="alpha",
        messages=MESSAGES,  # type: ignore[arg-type]
        max_tokens=12,
        temperature=0,
        stop=[end],
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.content == said.split(end)[0]


def test_the_asynchronous_client_runs_many_at_once(url: str, told: str, said: str) -> None:
    async def both() -> tuple[list[str], list[str]]:
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0) as client:

            async def complete() -> str:
                answer = await client.completions.create(
                    model="alpha", prompt=PROMPT, max_tokens=12, temperature=0
                )
                return answer.choices[0].text

            async def chat() -> str:
                stream = await client.chat.completions.create(
                    model="alpha", messages=MESSAGES, max_tokens=12, temperature=0, stream=True
                )
                return "".join(
                    [choice.delta.content or "" async for chunk in stream for choice in chunk.choices]
                )

            return (
                list(await asyncio.gather(*(complete() for _ in range(8)))),
                list(await asyncio.gather(*(chat() for _ in range(8)))),
            )

    completions, chats = asyncio.run(both())
    assert completions == [told] * 8
    assert chats == [said] * 8


def test_our_extensions_go_through_extra_body(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,  # type: ignore[arg-type]
        max_tokens=2,
        extra_body={"gates": {"alpha": 0.5, "beta": 0.25}},
    )
    assert answer.model_extra is not None
    assert answer.model_extra["routing"]["gates"] == {"alpha": 0.5, "beta": 0.25}


def test_models(client: openai.OpenAI) -> None:
    listed = [model.id for model in client.models.list()]
    assert listed[:1] == ["tiny"]
    assert {"alpha", "beta", "gamma", "shared"} <= set(listed)
    assert client.models.retrieve("alpha").id == "alpha"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_a_schema_is_kept_and_parsed(client: openai.OpenAI, unspaced: dict[str, float]) -> None:
    answer = client.chat.completions.parse(
        model="alpha",
        messages=QUESTION,  # type: ignore[arg-type]
        response_format=Weather,
        max_tokens=100,
        logit_bias=unspaced,  # type: ignore[arg-type]
    )
    assert isinstance(answer.choices[0].message.parsed, Weather)


def test_a_schema_is_kept_in_a_stream(client: openai.OpenAI, unspaced: dict[str, float]) -> None:
    with client.chat.completions.stream(
        model="alpha",
        messages=QUESTION,  # type: ignore[arg-type]
        response_format=Weather,
        max_tokens=100,
        logit_bias=unspaced,  # type: ignore[arg-type]
    ) as stream:
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Weather)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_tool_is_called_and_its_result_is_read(client: openai.OpenAI, choice: object) -> None:
    answer = client.chat.completions.create(
        model="alpha",
        messages=QUESTION,  # type: ignore[arg-type]
        tools=[TOOL],  # type: ignore[list-item]
        tool_choice=choice,  # type: ignore[arg-type]
        parallel_tool_calls=False,
        max_tokens=200,
    )
    [call] = answer.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "get_weather"
    check_arguments(json.loads(call.function.arguments))
    turns = [
        *QUESTION,
        answer.choices[0].message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "Sunny."},
    ]
    after = client.chat.completions.create(
        model="alpha",
        messages=turns,  # type: ignore[arg-type]
        tools=[TOOL],  # type: ignore[list-item]
        tool_choice="none",
        max_tokens=4,
    )
    assert after.choices[0].message.tool_calls is None
    assert after.choices[0].message.content is not None


def test_a_tool_is_called_in_a_stream(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="alpha",
        messages=QUESTION,  # type: ignore[arg-type]
        tools=[openai.pydantic_function_tool(Weather, name="report")],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=200,
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.done" in kinds
    [call] = final.choices[0].message.tool_calls or []
    assert call.function.name == "report"
    assert isinstance(call.function.parsed_arguments, Weather)


def test_embeddings(client: openai.OpenAI, server: Served) -> None:
    # The client asks for base64 by itself and decodes it.
    answer = client.embeddings.create(model="alpha", input=[PROMPT, "zebra", PROMPT])
    vectors = [item.embedding for item in answer.data]
    assert [item.index for item in answer.data] == [0, 1, 2]
    assert len({len(vector) for vector in vectors}) == 1
    assert vectors[0] == pytest.approx(vectors[2], abs=1e-5)
    assert vectors[0] != pytest.approx(vectors[1], abs=1e-3)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 0
    plain = client.embeddings.create(model="alpha", input=PROMPT, encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(vectors[0], abs=1e-5)


def test_a_response(client: openai.OpenAI) -> None:
    answer = client.responses.create(model="alpha", input=PROMPT, max_output_tokens=16, temperature=0)
    assert answer.object == "response"
    assert answer.status in ("completed", "incomplete")
    assert answer.output_text
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens


def test_a_streamed_response(client: openai.OpenAI) -> None:
    asked = {"model": "alpha", "input": PROMPT, "max_output_tokens": 16, "temperature": 0}
    whole = client.responses.create(**asked)  # type: ignore[call-overload]
    events = list(client.responses.create(**asked, stream=True))  # type: ignore[call-overload]
    assert events[0].type == "response.created"
    assert events[-1].type == f"response.{whole.status}"
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    assert events[-1].response.output_text == whole.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_a_response_in_a_shape_is_streamed_and_parsed(client: openai.OpenAI) -> None:
    with client.responses.stream(
        model="alpha", input="What is the weather in Rome?", text_format=Brief, max_output_tokens=200
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_response()
    assert {"response.created", "response.output_text.delta", "response.completed"} <= kinds
    assert isinstance(final.output_parsed, Brief)


def test_errors_are_the_clients_own(url: str, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="alpha", prompt=PROMPT, temperature=9)
    assert refused.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="nobody", prompt=PROMPT)
    assert missing.value.code == "model_not_found"
    with (
        openai.OpenAI(base_url=url, api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()
