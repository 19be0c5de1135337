"""Streams and whole answers agree, however a request is put and wherever the network cuts."""

import http.client
import itertools
import json
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai._streaming import SSEDecoder

from tests.api.harness import Served
from tests.fixtures.tiny import VOCABULARY

FEW = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
BROKEN = "\ufffd"

texts = st.text(min_size=1, max_size=12)
token_ids = st.lists(st.integers(3, VOCABULARY - 1), min_size=1, max_size=12)
prompts = st.one_of(
    texts, token_ids, st.lists(texts, min_size=1, max_size=3), st.lists(token_ids, min_size=1, max_size=3)
)
bodies = st.fixed_dictionaries(
    {"model": st.sampled_from(["tiny", "alpha", "shared"]), "prompt": prompts},
    optional={
        "n": st.integers(1, 3),
        "temperature": st.sampled_from([0, 0.7, 1.5]),
        "top_p": st.floats(0.1, 1),
        "top_k": st.integers(-1, 20),
        "min_p": st.floats(0, 0.5),
        "echo": st.booleans(),
        "logprobs": st.integers(0, 3),
        "stop": st.lists(st.sampled_from(["a", "qu", "é", " ", "\n", BROKEN]), min_size=1, max_size=3),
        "logit_bias": st.dictionaries(
            st.integers(3, VOCABULARY - 1).map(str), st.integers(-100, 100), max_size=3
        ),
        "ignore_eos": st.booleans(),
        "min_tokens": st.integers(0, 4),
        "frequency_penalty": st.floats(-2, 2),
        "repetition_penalty": st.floats(0.5, 2),
    },
)


def whole(server: Served, body: dict[str, Any]) -> dict[str, Any]:
    answer = server.post("/v1/completions", body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def streamed(server: Served, body: dict[str, Any]) -> tuple[dict[int, dict[str, Any]], dict[str, Any]]:
    """Choices put together from a stream, and its usage."""
    choices: dict[int, dict[str, Any]] = {}
    usage = None
    for chunk in server.chunks("/v1/completions", {**body, "stream_options": {"include_usage": True}}):
        usage = chunk.get("usage")
        for piece in chunk["choices"]:
            one = choices.setdefault(
                piece["index"], {"text": "", "ids": [], "prompt_ids": [], "reason": None}
            )
            assert one["reason"] is None, "a piece after the last"
            one["text"] += piece["text"]
            one["ids"] += piece.get("token_ids") or []
            one["prompt_ids"] += piece.get("prompt_token_ids") or []
            one["reason"] = piece["finish_reason"]
    assert usage is not None
    return choices, usage


def decoded(server: Served, prompt: list[int], ids: list[int]) -> str:
    """What the tokenizer makes of the tokens behind their prompt."""
    decode = server.runtime.tokenizer.backend_tokenizer.decode
    before = decode(prompt, skip_special_tokens=True)
    after = decode(prompt + ids, skip_special_tokens=True)
    same = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(before))
    return after[same:]


@FEW
@given(body=bodies, seed=st.integers(-(2**63), 2**63 - 1))
def test_a_stream_is_the_whole_answer_and_its_ids_are_its_text(
    server: Served, body: dict[str, Any], seed: int
) -> None:
    body = {**body, "seed": seed, "max_tokens": 10, "return_token_ids": True}
    answer = whole(server, body)
    choices, usage = streamed(server, body)
    assert len(answer["choices"]) == len(choices)
    for index, choice in enumerate(answer["choices"]):
        assert choice["index"] == index
        part = choices[index]
        assert part["text"] == choice["text"]
        assert part["reason"] == choice["finish_reason"]
        assert part["ids"] == choice["token_ids"]
        assert part["prompt_ids"] == choice["prompt_token_ids"]
        if "stop" not in body:
            expected = decoded(server, choice["prompt_token_ids"], choice["token_ids"])
            assert choice["text"].endswith(expected)
            assert body.get("echo") or choice["text"] == expected
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert usage[name] == answer["usage"][name]
    assert usage["completion_tokens"] == sum(len(choice["token_ids"]) for choice in answer["choices"])
    n = body.get("n", 1)
    assert usage["prompt_tokens"] == sum(len(choice["prompt_token_ids"]) for choice in answer["choices"][::n])
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


@FEW
@given(prompt=texts, n=st.integers(1, 2))
def test_all_forms_of_a_prompt_get_the_same_answer(server: Served, prompt: str, n: int) -> None:
    ids = list(server.runtime.tokenizer.encode(prompt))
    told = [
        whole(server, {"model": "alpha", "prompt": form, "n": n, "max_tokens": 6, "temperature": 0})
        for form in (prompt, ids, [prompt], [ids])
    ]
    first = [(choice["text"], choice["finish_reason"]) for choice in told[0]["choices"]]
    for answer in told[1:]:
        assert [(choice["text"], choice["finish_reason"]) for choice in answer["choices"]] == first
        assert answer["usage"]["total_tokens"] == told[0]["usage"]["total_tokens"]


@FEW
@given(
    body=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
        max_leaves=12,
    ),
    field=st.sampled_from(
        ["prompt", "stop", "gates", "logit_bias", "n", "stream", "seed", "model", "max_tokens"]
    ),
    path=st.sampled_from(["/v1/completions", "/v1/chat/completions", "/v1/route"]),
)
def test_whatever_json_is_sent_the_answer_is_an_answer_or_names_the_fault(
    server: Served, body: Any, field: str, path: str
) -> None:
    for content in (body, {"model": "tiny", "prompt": "x", "max_tokens": 1, field: body}):
        answer = server.http.post(
            path, content=json.dumps(content).encode(), headers={"Content-Type": "application/json"}
        )
        assert answer.status_code in (200, 400, 404), answer.text
        if answer.status_code != 200:
            assert answer.json()["error"]["message"]


@FEW
@given(cuts=st.lists(st.integers(0, 10_000), max_size=6))
def test_a_request_is_read_the_same_wherever_it_is_cut(server: Served, cuts: list[int]) -> None:
    body = {"model": "alpha", "prompt": "¿Cómo? «río»", "max_tokens": 2, "temperature": 0, "echo": True}
    content = json.dumps(body, ensure_ascii=False).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    )
    request = f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content
    places = sorted({cut % len(request) for cut in cuts} | {0, len(request)})
    place = urlsplit(server.url)
    with socket.create_connection((str(place.hostname), place.port or 80), timeout=30) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for begin, end in itertools.pairwise(places):
            connection.sendall(request[begin:end])
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        assert answer.status == 200
        told = json.loads(answer.read())
    assert told["choices"] == server.complete(**body)["choices"]


@pytest.fixture(scope="module")
def raw(server: Served) -> bytes:
    """A stream as it goes over the wire, chunked transfer undone; its text has characters of several bytes."""
    place = urlsplit(server.url)
    connection = http.client.HTTPConnection(str(place.hostname), place.port, timeout=30)
    body = {"model": "alpha", "prompt": "¿Cómo? «río»", "max_tokens": 6, "echo": True, "stream": True}
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        return connection.getresponse().read()
    finally:
        connection.close()


@given(cuts=st.lists(st.integers(0, 10_000), max_size=30))
def test_a_stream_reads_the_same_wherever_it_is_cut(raw: bytes, cuts: list[int]) -> None:
    places = sorted({cut % len(raw) for cut in cuts} | {0, len(raw)})

    def pieces() -> Iterator[bytes]:
        for begin, end in itertools.pairwise(places):
            yield raw[begin:end]

    events = [event.data for event in SSEDecoder().iter_bytes(pieces())]
    assert events == [event.data for event in SSEDecoder().iter_bytes(iter([raw]))]
    assert events[-1] == "[DONE]"
    assert json.loads(events[0])["choices"][0]["text"] == "¿Cómo? «río»"
