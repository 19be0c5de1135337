"""Every refusal and failure, as the `openai` package raises it."""

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from tests.api.harness import Served, serving
from tests.fixtures.tiny import CONTEXT, TinyFamily

KEY = "key-of-the-tests"
LONG: dict[str, Any] = {"model": "tiny", "prompt": "a", "max_tokens": 200, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def keyed(family: TinyFamily) -> Iterator[Served]:
    """A server that wants a key and has room for two sequences."""
    with serving(family.bundle, api_keys=KEY, max_batch=1, max_queue=1) as served:
        yield served


def client_of(served: Served, key: str = KEY) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=0)


def chat(client: openai.OpenAI, **options: Any) -> object:
    messages: Any = [{"role": "user", "content": "Add 1 and 2."}]
    return client.chat.completions.create(**{"model": "tiny", "messages": messages, **options})


def complete(client: openai.OpenAI, **options: Any) -> object:
    return client.completions.create(**{"model": "tiny", "prompt": "a", "max_tokens": 2, **options})


Ask = Callable[..., object]


@pytest.mark.parametrize("ask", [complete, chat])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("options", "raised", "status", "code", "param"),
    [
        ({"model": "nobody"}, openai.NotFoundError, 404, "model_not_found", "model"),
        ({"max_tokens": CONTEXT}, openai.BadRequestError, 400, "context_length_exceeded", "max_tokens"),
        ({"extra_body": {"temprature": 1}}, openai.BadRequestError, 400, "invalid_request", "temprature"),
        ({"extra_body": {"best_of": 2}}, openai.BadRequestError, 400, "unsupported_parameter", "best_of"),
        ({"temperature": 1e-9}, openai.BadRequestError, 400, "invalid_request", "temperature"),
        ({"n": 17}, openai.BadRequestError, 400, "limit_exceeded", "n"),
        (
            {"extra_body": {"gates": {"nobody": 1}}},
            openai.BadRequestError,
            400,
            "unknown_expert",
            "gates.nobody",
        ),
    ],
)
def test_a_refusal_is_the_exception_of_its_status(
    keyed: Served,
    ask: Ask,
    stream: bool,
    options: dict[str, Any],
    raised: type[openai.APIStatusError],
    status: int,
    code: str,
    param: str,
) -> None:
    with client_of(keyed) as client, pytest.raises(raised) as caught:
        ask(client, **options, stream=stream)
    error = caught.value
    assert (error.status_code, error.code, error.param, error.type) == (
        status,
        code,
        param,
        "invalid_request_error",
    )
    assert error.request_id
    assert error.message


@pytest.mark.parametrize("ask", [complete, chat])
def test_a_wrong_key_is_an_authentication_error(keyed: Served, ask: Ask) -> None:
    with client_of(keyed, "wrong") as client, pytest.raises(openai.AuthenticationError) as caught:
        ask(client)
    assert (caught.value.status_code, caught.value.code) == (401, "invalid_api_key")
    with client_of(keyed) as client:
        assert ask(client)


@pytest.mark.parametrize("path", ["/completions", "/chat/completions"])
@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_number_that_json_does_not_have_is_a_bad_request(keyed: Served, path: str, number: str) -> None:
    body = f'{{"model": "tiny", "prompt": "a", "messages": [], "gates": {{"alpha": {number}}}}}'
    with client_of(keyed) as client, pytest.raises(openai.BadRequestError) as caught:
        client.post(
            path,
            cast_to=object,
            content=body.encode(),
            options={"headers": {"Content-Type": "application/json"}},
        )
    assert caught.value.status_code == 400


def test_a_full_queue_is_a_rate_limit_error_that_says_when_to_come_again(keyed: Served) -> None:
    async def flood() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{keyed.url}/v1", api_key=KEY, max_retries=0) as client:
            asked = (client.completions.create(**LONG) for _ in range(8))
            return list(await asyncio.gather(*asked, return_exceptions=True))

    answers = asyncio.run(flood())
    refused = [answer for answer in answers if isinstance(answer, BaseException)]
    assert 0 < len(refused) < len(answers)
    for error in refused:
        assert isinstance(error, openai.RateLimitError)
        assert (error.status_code, error.code, error.type) == (429, "queue_full", "rate_limit_error")
        assert int(error.response.headers["retry-after"]) >= 1


def test_the_clients_own_retries_get_through_a_full_queue(keyed: Served) -> None:
    async def flood() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{keyed.url}/v1", api_key=KEY, max_retries=8) as client:
            return list(await asyncio.gather(*(client.completions.create(**LONG) for _ in range(4))))

    assert all(answer.choices[0].finish_reason == "length" for answer in asyncio.run(flood()))


@pytest.mark.parametrize("ask", [complete, chat])
def test_an_engine_that_ends_breaks_the_stream_with_an_error_and_is_503_from_then_on(
    family: TinyFamily, ask: Ask
) -> None:
    with serving(family.bundle) as served, client_of(served) as client:
        stream: Any = ask(client, max_tokens=200, extra_body={"ignore_eos": True}, stream=True)
        next(stream)
        served.runtime.close()
        with pytest.raises(openai.APIError) as broken:
            list(stream)
        assert broken.value.code in ("shutting_down", "engine_dead")
        assert broken.value.message
        with pytest.raises(openai.InternalServerError) as dead:
            ask(client)
        assert (dead.value.status_code, dead.value.code) == (503, "engine_dead")
