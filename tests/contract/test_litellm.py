"""litellm: as an OpenAI-compatible server, and as a vLLM one."""

import asyncio
import json

import litellm
import pytest

from tests.contract.cases import QUESTION, TOOL, Weather, check_arguments
from tests.contract.conftest import KEY, MESSAGES, PROMPT

pytestmark = pytest.mark.filterwarnings("default")  # its own, about its own parts


@pytest.fixture
def to(url: str) -> dict[str, object]:
    return {"api_base": url, "api_key": KEY, "num_retries": 0}


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_a_chat(to: dict, provider: str, said: str) -> None:
    answer = litellm.completion(f"{provider}/alpha", MESSAGES, max_tokens=12, temperature=0, **to)
    assert answer.choices[0].message.content == said
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_streamed_chat(to: dict, said: str) -> None:
    stream = litellm.completion(
        "openai/alpha",
        MESSAGES,
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        **to,
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == said
    assert litellm.stream_chunk_builder(chunks).choices[0].message.content == said


def test_asynchronous_chats(to: dict, said: str) -> None:
    async def ask() -> list[str]:
        async def one() -> str:
            answer = await litellm.acompletion("openai/alpha", MESSAGES, max_tokens=12, temperature=0, **to)
            return answer.choices[0].message.content

        return list(await asyncio.gather(*(one() for _ in range(4))))

    assert asyncio.run(ask()) == [said] * 4


def test_a_completion(to: dict, told: str) -> None:
    answer = litellm.text_completion(
        model="text-completion-openai/alpha", prompt=PROMPT, max_tokens=12, temperature=0, **to
    )
    assert answer.choices[0].text == told


def test_an_answer_in_a_shape(to: dict, unspaced: dict[str, float]) -> None:
    answer = litellm.completion(
        "openai/alpha", QUESTION, response_format=Weather, max_tokens=100, logit_bias=unspaced, **to
    )
    Weather.model_validate_json(answer.choices[0].message.content)


def test_a_tool_is_called(to: dict) -> None:
    answer = litellm.completion(
        "openai/alpha",
        QUESTION,
        tools=[TOOL],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=200,
        **to,
    )
    call = answer.choices[0].message.tool_calls[0]
    assert call.function.name == "get_weather"
    check_arguments(json.loads(call.function.arguments))


def test_our_extensions_go_through_extra_body(to: dict) -> None:
    answer = litellm.completion(
        "openai/tiny", MESSAGES, max_tokens=2, extra_body={"gates": {"beta": 1}}, **to
    )
    assert answer.choices[0].message.content is not None


def test_embeddings(to: dict) -> None:
    answer = litellm.embedding("openai/alpha", input=[PROMPT, "zebra"], encoding_format="float", **to)
    one, other = (item["embedding"] for item in answer.data)
    assert len(one) == len(other) > 0


def test_errors_are_its_own(to: dict) -> None:
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion("openai/alpha", MESSAGES, temperature=9, **to)
    with pytest.raises(litellm.NotFoundError):
        litellm.completion("openai/nobody", MESSAGES, **to)
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion("openai/alpha", MESSAGES, **to | {"api_key": "wrong"})
