"""Everything that a client can get wrong, and the one answer to it: a 4xx that names the field and the limit."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.api.harness import Served, error_of, eventually, serving
from tests.fixtures.tiny import CONTEXT, VOCABULARY, TinyFamily

LIMITS: dict[str, Any] = {
    "max_prompt_tokens": 100,
    "max_tokens": 64,
    "max_n": 2,
    "max_prompts": 3,
    "max_messages": 4,
    "max_stop": 2,
    "max_stop_length": 5,
    "max_logprobs": 5,
    "max_timeout_seconds": 30,
    "max_gate": 4,
    "max_body_bytes": 20_000,
    "max_json_depth": 8,
    "max_batch": 4,
    "max_queue": 4,
}


@pytest.fixture(scope="module")
def strict(family: TinyFamily) -> Iterator[Served]:
    with serving(family.bundle, **LIMITS) as served:
        yield served


BAD: list[tuple[str, dict[str, Any], str, str]] = [
    # limits
    ("long prompt", {"prompt": [1] * 101}, "prompt", "limit_exceeded"),
    ("max_tokens", {"max_tokens": 65}, "max_tokens", "limit_exceeded"),
    ("n", {"n": 3}, "n", "limit_exceeded"),
    ("prompts", {"prompt": ["a"] * 4}, "prompt", "limit_exceeded"),
    ("stops", {"stop": ["a", "b", "c"]}, "stop", "limit_exceeded"),
    ("stop length", {"stop": "123456"}, "stop", "limit_exceeded"),
    ("stop ids", {"stop_token_ids": [1, 2, 3]}, "stop_token_ids", "limit_exceeded"),
    ("min_tokens", {"min_tokens": 65}, "min_tokens", "limit_exceeded"),
    ("min over max", {"min_tokens": 9, "max_tokens": 8}, "min_tokens", "limit_exceeded"),
    ("logprobs", {"logprobs": 6}, "logprobs", "limit_exceeded"),
    ("timeout", {"timeout": 30.5}, "timeout", "limit_exceeded"),
    ("large gate", {"gates": {"alpha": 4.5}}, "gates.alpha", "limit_exceeded"),
    ("negative huge gate", {"gates": {"alpha": -1e30}}, "gates.alpha", "limit_exceeded"),
    ("many gates", {"gates": {str(i): 1 for i in range(100)}}, "gates", "limit_exceeded"),
    # prompts
    ("no prompt", {"prompt": None}, "prompt", "invalid_request"),
    ("empty prompt", {"prompt": ""}, "prompt", "invalid_request"),
    ("empty list", {"prompt": []}, "prompt", "invalid_request"),
    ("empty ids", {"prompt": [[]]}, "prompt", "invalid_request"),
    ("one empty of two", {"prompt": ["a", ""]}, "prompt", "invalid_request"),
    ("mixed", {"prompt": ["a", [1]]}, "prompt", "invalid_request"),
    ("mixed ids", {"prompt": [1, "a"]}, "prompt", "invalid_request"),
    ("floats", {"prompt": [1.5]}, "prompt", "invalid_request"),
    ("booleans", {"prompt": [True]}, "prompt", "invalid_request"),
    ("object", {"prompt": {"a": 1}}, "prompt", "invalid_request"),
    ("negative id", {"prompt": [1, -1]}, "prompt", "invalid_request"),
    ("id beyond", {"prompt": [VOCABULARY]}, "prompt", "invalid_request"),
    ("huge id", {"prompt": [[1], [10**30]]}, "prompt[1]", "invalid_request"),
    # names and gates
    ("no model", {"model": None}, "model", "invalid_request"),
    ("empty model", {"model": ""}, "model", "invalid_request"),
    ("unknown expert", {"gates": {"nobody": 1}}, "gates.nobody", "unknown_expert"),
    ("gates with expert", {"model": "alpha", "gates": {"beta": 1}}, "gates", "invalid_request"),
    ("gates with shared", {"model": "shared", "gates": {"beta": 1}}, "gates", "invalid_request"),
    ("text gate", {"gates": {"alpha": "1"}}, "gates", "invalid_request"),
    ("boolean gate", {"gates": {"alpha": True}}, "gates", "invalid_request"),
    ("infinite integer gate", {"gates": {"alpha": 10**400}}, "gates", "invalid_request"),
    ("list of gates", {"gates": [1]}, "gates", "invalid_request"),
    ("routing with gates", {"gates": {"alpha": 1}, "routing": {"top_k": 1}}, "routing", "invalid_request"),
    ("routing with expert", {"model": "alpha", "routing": {"top_k": 1}}, "routing", "invalid_request"),
    ("routing top_k", {"routing": {"top_k": 0}}, "routing.top_k", "invalid_request"),
    ("routing threshold", {"routing": {"threshold": 1.5}}, "routing.threshold", "invalid_request"),
    ("routing unknown", {"routing": {"mood": 1}}, "routing.mood", "invalid_request"),
    # numbers
    ("negative max_tokens", {"max_tokens": -1}, "max_tokens", "invalid_request"),
    ("zero max_tokens", {"max_tokens": 0}, "max_tokens", "invalid_request"),
    ("text max_tokens", {"max_tokens": "5"}, "max_tokens", "invalid_request"),
    ("fraction", {"max_tokens": 1.5}, "max_tokens", "invalid_request"),
    ("zero n", {"n": 0}, "n", "invalid_request"),
    ("negative temperature", {"temperature": -0.1}, "temperature", "invalid_request"),
    ("hot", {"temperature": 2.1}, "temperature", "invalid_request"),
    ("nearly greedy", {"temperature": 9e-6}, "temperature", "invalid_request"),
    ("denormal temperature", {"temperature": 1e-310}, "temperature", "invalid_request"),
    ("top_p zero", {"top_p": 0}, "top_p", "invalid_request"),
    ("top_p over", {"top_p": 1.01}, "top_p", "invalid_request"),
    ("top_k", {"top_k": -2}, "top_k", "invalid_request"),
    ("min_p", {"min_p": -0.5}, "min_p", "invalid_request"),
    ("repetition", {"repetition_penalty": 0}, "repetition_penalty", "invalid_request"),
    ("tiny repetition", {"repetition_penalty": 0.009}, "repetition_penalty", "invalid_request"),
    ("denormal repetition", {"repetition_penalty": 1e-310}, "repetition_penalty", "invalid_request"),
    ("frequency", {"frequency_penalty": 2.5}, "frequency_penalty", "invalid_request"),
    ("presence", {"presence_penalty": -2.5}, "presence_penalty", "invalid_request"),
    ("seed", {"seed": 2**63}, "seed", "invalid_request"),
    ("negative seed", {"seed": -(2**63) - 1}, "seed", "invalid_request"),
    ("fractional seed", {"seed": 1.5}, "seed", "invalid_request"),
    ("min_tokens", {"min_tokens": -1}, "min_tokens", "invalid_request"),
    ("stop id beyond", {"stop_token_ids": [VOCABULARY]}, "stop_token_ids", "invalid_request"),
    ("negative stop id", {"stop_token_ids": [-1]}, "stop_token_ids", "invalid_request"),
    ("empty stop", {"stop": [""]}, "stop", "invalid_request"),
    ("numeric stop", {"stop": 5}, "stop", "invalid_request"),
    ("stream", {"stream": "yes"}, "stream", "invalid_request"),
    ("options without stream", {"stream_options": {}}, "stream_options", "invalid_request"),
    ("negative logprobs", {"logprobs": -1}, "logprobs", "invalid_request"),
    ("boolean logprobs", {"logprobs": True}, "logprobs", "invalid_request"),
    ("numeric echo", {"echo": 1}, "echo", "invalid_request"),
    ("bias beyond", {"logit_bias": {str(VOCABULARY): 1}}, "logit_bias", "invalid_request"),
    ("large bias", {"logit_bias": {"1": 100.5}}, "logit_bias", "invalid_request"),
    ("text as biased", {"logit_bias": {"the": 1}}, "logit_bias", "invalid_request"),
    ("many biases", {"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "invalid_request"),
    ("priority", {"priority": 2**31}, "priority", "invalid_request"),
    ("fractional priority", {"priority": 0.5}, "priority", "invalid_request"),
    ("no time", {"timeout": 0}, "timeout", "invalid_request"),
    ("text timeout", {"timeout": "1"}, "timeout", "invalid_request"),
    ("user", {"user": "x" * 513}, "user", "invalid_request"),
    # fields
    ("unknown field", {"temprature": 1}, "temprature", "invalid_request"),
    ("best_of", {"best_of": 2}, "best_of", "unsupported_parameter"),
    ("suffix", {"suffix": "x"}, "suffix", "unsupported_parameter"),
    ("prompt_logprobs", {"prompt_logprobs": 6}, "prompt_logprobs", "limit_exceeded"),
    ("all prompt_logprobs", {"prompt_logprobs": -1}, "prompt_logprobs", "invalid_request"),
    ("streamed prompt_logprobs", {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "invalid_request"),
    ("nothing to say", {"max_tokens": 0, "echo": False}, "max_tokens", "invalid_request"),
    ("nothing allowed", {"allowed_token_ids": []}, "allowed_token_ids", "invalid_request"),
    ("allowed beyond", {"allowed_token_ids": [VOCABULARY]}, "allowed_token_ids", "invalid_request"),
    ("blank bad word", {"bad_words": [" "]}, "bad_words", "invalid_request"),
    ("many bad words", {"bad_words": ["a"] * 129}, "bad_words", "invalid_request"),
    ("truncate to nothing", {"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "invalid_request"),
    ("truncate to more", {"truncate_prompt_tokens": 101}, "truncate_prompt_tokens", "context_length_exceeded"),
    ("request_id", {"request_id": "has a space"}, "request_id", "invalid_request"),
    ("long request_id", {"request_id": "x" * 129}, "request_id", "invalid_request"),
    ("metadata", {"metadata": {"a": 1}}, "metadata.a", "invalid_request"),
    ("routing temperature", {"routing": {"temperature": 0}}, "routing.temperature", "invalid_request"),
    ("routing router", {"routing": {"router": "oracle"}}, "routing.router", "invalid_request"),
    ("guided", {"guided_regex": "("}, "guided_regex", "invalid_request"),
    ("obfuscation", {"stream": True, "stream_options": {"include_obfuscation": True}},
     "stream_options.include_obfuscation", "unsupported_parameter"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "param", "code"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_a_bad_field_is_refused_by_name(
    strict: Served, change: dict[str, Any], param: str, code: str
) -> None:
    body = {"model": "tiny", "prompt": "Add 1 and 2.", "max_tokens": 1, **change}
    answer = strict.post("/v1/completions", body)
    error = error_of(answer)
    assert answer.status_code == 400, error
    assert (error["param"], error["code"]) == (param, code), error
    assert error["type"] == "invalid_request_error"


def test_every_limit_error_says_the_limit(strict: Served) -> None:
    for _, change, _, code in BAD:
        if code == "limit_exceeded":
            body = {"model": "tiny", "prompt": "a", "max_tokens": 1, **change}
            message = error_of(strict.post("/v1/completions", body))["message"]
            assert any(character.isdigit() for character in message)
            assert any(name in message for name in (*LIMITS, "registered")), message


def test_the_context_is_a_limit_of_prompt_and_answer_together(server: Served) -> None:
    for body in ({"prompt": [5] * CONTEXT}, {"prompt": [5] * 200, "max_tokens": CONTEXT - 199}):
        answer = server.post("/v1/completions", {"model": "tiny", **body})
        assert answer.status_code == 400
        assert error_of(answer)["code"] == "context_length_exceeded"
        assert str(CONTEXT) in error_of(answer)["message"]
    fits = server.complete(prompt=[5] * 200, max_tokens=CONTEXT - 200, ignore_eos=True)
    assert fits["usage"]["total_tokens"] == CONTEXT


def test_an_unknown_model_is_not_found(strict: Served) -> None:
    answer = strict.post("/v1/completions", {"model": "gpt-4", "prompt": "a"})
    assert answer.status_code == 404
    assert error_of(answer)["code"] == "model_not_found"
    assert error_of(answer)["param"] == "model"


def test_too_many_messages_and_profiles_are_limits_too(strict: Served) -> None:
    messages = [{"role": "user", "content": "a"}] * 5
    for path, body in (
        ("/v1/chat/completions", {"model": "tiny", "messages": messages}),
        ("/v1/route", {"messages": messages}),
        ("/v1/route", {"messages": [messages[:1]] * 4}),
        ("/v1/route", {"prompt": ["a"] * 4}),
    ):
        answer = strict.post(path, body)
        assert answer.status_code == 400
        assert error_of(answer)["code"] == "limit_exceeded"


def send(strict: Served, content: bytes, **headers: str) -> httpx.Response:
    return strict.http.post(
        "/v1/completions", content=content, headers={"Content-Type": "application/json", **headers}
    )


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[1, 2",
        b"null",
        b"[]",
        b'"text"',
        b"5",
        b'{"model": "tiny", "prompt": "a",}',
        b'{"model": "tiny", "prompt": "a", "gates": {"alpha": NaN}}',
        b'{"model": "tiny", "prompt": "a", "temperature": Infinity}',
        b'{"model": "tiny", "prompt": "a", "temperature": -Infinity}',
        b'{"model": "tiny", "prompt": "a", "temperature": 1e999}',
        b'{"model": "tiny", "prompt": "a", "gates": {"alpha": 1e999}}',
        b'{"model": "tiny", "model": "alpha", "prompt": "a"}',
        b'{"model": "tiny", "prompt": "\xff"}',
        b'{"model": "tiny", "prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"model": "tiny", "prompt": "a lone surrogate \\ud800"}',
        b'{"model": "tiny\\ud800", "prompt": "a"}',
        b'{"model": "tiny", "prompt": "a", "\\ud800": 1}',
        b'{"model": "tiny", "prompt": "a", "gates": {"\\ud800": 1}}',
        b'{"model": "tiny", "prompt": "a", "routing": {"\\ud800": 1}}',
        b"\x00\x01\x02",
    ],
)
def test_what_is_not_a_json_object_is_refused(strict: Served, content: bytes) -> None:
    answer = send(strict, content)
    assert answer.status_code == 400
    assert error_of(answer)["type"] == "invalid_request_error"


def test_deep_nesting_is_refused_whatever_it_is_made_of(strict: Served) -> None:
    for content in (
        b"[" * 10_000,
        b'{"a":' * 2_000,
        b'{"model":"tiny","prompt":' + b"[" * 9 + b"]" * 9 + b"}",
    ):
        answer = send(strict, content)
        assert answer.status_code == 400
        assert "max_json_depth" in error_of(answer)["message"]
    brackets_in_text = {"model": "tiny", "prompt": '["[[[[[[[[[[' * 3, "max_tokens": 1}
    assert strict.post("/v1/completions", brackets_in_text).status_code == 200


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""]
)
def test_another_content_type_is_refused(strict: Served, kind: str) -> None:
    content = json.dumps({"model": "tiny", "prompt": "a"}).encode()
    answer = strict.http.post(
        "/v1/completions", content=content, headers={"Content-Type": kind} if kind else {}
    )
    assert answer.status_code == 415
    assert error_of(answer)["code"] == "unsupported_media_type"


def test_a_large_body_is_refused_by_its_length_and_in_chunks(strict: Served) -> None:
    content = json.dumps({"model": "tiny", "prompt": "a" * 30_000}).encode()

    def chunked() -> Iterator[bytes]:
        for start in range(0, len(content), 1000):
            yield content[start : start + 1000]

    for body in (content, chunked()):
        answer = strict.http.post(
            "/v1/completions", content=body, headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 413
        assert error_of(answer)["code"] == "body_too_large"
        assert "20000" in error_of(answer)["message"]


def test_unknown_routes_and_methods_have_the_same_shape(strict: Served) -> None:
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("GET", "/", 405),
        ("POST", "/v1/completions/", 404),
        ("GET", "/v1/completions", 405),
        ("PUT", "/v1/models", 405),
        ("GET", "/docs", 404),
    ):
        answer = strict.http.request(method, path)
        assert answer.status_code == status
        assert path in error_of(answer)["message"]


def test_a_full_queue_is_429_and_the_others_are_served(strict: Served) -> None:
    body = {"model": "tiny", "prompt": "a", "max_tokens": 64, "ignore_eos": True}

    async def flood() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=strict.url, timeout=60) as client:
            return list(await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(32))))

    answers = asyncio.run(flood())
    served = [answer for answer in answers if answer.status_code == 200]
    refused = [answer for answer in answers if answer.status_code != 200]
    assert len(served) >= LIMITS["max_batch"] + LIMITS["max_queue"]
    assert refused
    for answer in refused:
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        error = error_of(answer)
        assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
    assert strict.complete(prompt="a", max_tokens=1)


def test_a_request_that_is_refused_halfway_leaves_nothing_running(strict: Served) -> None:
    many = {"model": "tiny", "prompt": ["a", "b", "c"], "n": 2, "max_tokens": 64, "ignore_eos": True}

    async def two() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=strict.url, timeout=60) as client:
            return list(await asyncio.gather(*(client.post("/v1/completions", json=many) for _ in range(3))))

    answers = asyncio.run(two())
    assert sorted({answer.status_code for answer in answers}) == [200, 429]
    gauges = strict.runtime.gauges
    assert eventually(lambda: gauges().running == gauges().waiting == gauges().kv_blocks_used == 0)


def test_more_sequences_than_ever_fit_are_a_400_not_a_429(family: TinyFamily) -> None:
    with serving(family.bundle, max_batch=2, max_queue=2) as small:
        answer = small.post("/v1/completions", {"model": "tiny", "prompt": "a", "n": 5})
        assert answer.status_code == 400
        assert error_of(answer)["param"] == "n"
