"""Log-probabilities and echoed prompts at the edge: both of OpenAI's shapes, whole and streamed."""

import json
import math
from collections.abc import Sequence
from typing import Any

import pytest

from service.core import Event, Finished, GenerationRequest, TextDelta, TokenLogprobs, Usage
from tests.unit.service.backend import OUTCOME, ScriptedBackend
from tests.unit.service.edge import BODY, call, events

A, B, C = map(ord, "abc")
CHAT = {"model": "family", "messages": [{"role": "user", "content": "abc"}]}


def score(token: int, logprob: float, *top: tuple[int, float]) -> TokenLogprobs:
    return TokenLogprobs(token, logprob, 1, top)


def scored(request: GenerationRequest) -> Sequence[Event | float | Exception]:
    """`b` is held back until `c` has come; its chance was nothing."""
    prompt = None
    if request.sampling.prompt_logprobs is not None:
        prompt = tuple(score(token, -1.5, (C, -0.5)) for token in request.prompt_ids[1:])
    return [
        TextDelta("a", (A,), (score(A, -0.25, (A, -0.25), (B, -1.5)),)),
        TextDelta("", (B,), (score(B, -math.inf, (C, -0.125)),)),
        TextDelta("bc", (C,), (score(C, -2.0),)),
        Finished("stop", Usage(3, 3), OUTCOME, None, prompt),
    ]


def ask(body: dict[str, Any], path: str = "/v1/completions", **settings: Any) -> dict[str, Any]:
    answer = call(ScriptedBackend(scored), body, path, **settings)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def stream(body: dict[str, Any], path: str = "/v1/completions") -> list[dict[str, Any]]:
    told = events(call(ScriptedBackend(scored), {**body, "stream": True}, path))
    assert told[-1] == "[DONE]"
    return [json.loads(event)["choices"][0] for event in told[:-1]]


LEGACY = {
    "tokens": ["a", "b", "c"],
    "token_logprobs": [-0.25, -9999.0, -2.0],
    "top_logprobs": [{"a": -0.25, "b": -1.5}, {"c": -0.125, "b": -9999.0}, {"c": -2.0}],
    "text_offset": [0, 1, 2],
}
CONTENT = [
    {
        "token": "a",
        "logprob": -0.25,
        "bytes": [97],
        "top_logprobs": [
            {"token": "a", "logprob": -0.25, "bytes": [97]},
            {"token": "b", "logprob": -1.5, "bytes": [98]},
        ],
    },
    {
        "token": "b",
        "logprob": -9999.0,
        "bytes": [98],
        "top_logprobs": [{"token": "c", "logprob": -0.125, "bytes": [99]}],
    },
    {"token": "c", "logprob": -2.0, "bytes": [99], "top_logprobs": []},
]


def joined(pieces: list[dict[str, Any]]) -> dict[str, Any]:
    """The lists of streamed legacy log-probabilities, one after the other."""
    found = [piece["logprobs"] for piece in pieces if piece["logprobs"] is not None]
    return {name: [entry for part in found for entry in part[name]] for name in LEGACY}


def test_a_completion_has_the_older_shape() -> None:
    [choice] = ask({**BODY, "logprobs": 2})["choices"]
    assert choice["logprobs"] == LEGACY
    assert choice["text"] == "abc"


def test_a_streamed_completion_has_the_same_in_pieces() -> None:
    pieces = stream({**BODY, "logprobs": 2})
    assert joined(pieces) == LEGACY
    assert [piece["text"] for piece in pieces] == ["a", "", "bc", ""]


def test_a_chat_has_the_newer_shape() -> None:
    [choice] = ask({**CHAT, "logprobs": True, "top_logprobs": 2}, "/v1/chat/completions")["choices"]
    assert choice["logprobs"] == {"content": CONTENT, "refusal": None}


def test_a_streamed_chat_has_the_same_in_pieces() -> None:
    pieces = stream({**CHAT, "logprobs": True, "top_logprobs": 2}, "/v1/chat/completions")
    told = [piece["logprobs"] for piece in pieces if piece["logprobs"] is not None]
    assert [entry for one in told for entry in one["content"]] == CONTENT


@pytest.mark.parametrize(("body", "path"), [(BODY, "/v1/completions"), (CHAT, "/v1/chat/completions")])
def test_who_does_not_ask_gets_none(body: dict[str, Any], path: str) -> None:
    assert ask(body, path)["choices"][0]["logprobs"] is None
    assert all(piece["logprobs"] is None for piece in stream(body, path))


def test_an_echo_puts_the_prompt_in_front_of_every_choice() -> None:
    body = {**BODY, "prompt": ["xyz", "ab"], "echo": True, "n": 2}
    answer = ask(body)
    assert [choice["text"] for choice in answer["choices"]] == ["xyzabc", "xyzabc", "ababc", "ababc"]
    assert [choice["logprobs"] for choice in answer["choices"]] == [None] * 4
    texts = [""] * 4
    for piece in stream(body):
        texts[piece["index"]] += piece["text"]
    assert texts == [choice["text"] for choice in answer["choices"]]


def test_an_echo_of_token_ids_is_their_text() -> None:
    assert ask({**BODY, "prompt": [[97, 98], [0]], "echo": True})["choices"][1]["text"] == "dabc"


def test_an_echo_with_logprobs_scores_the_prompt_from_its_second_token_on() -> None:
    body = {**BODY, "prompt": "xyz", "echo": True, "logprobs": 1}
    [choice] = ask(body)["choices"]
    assert choice["text"] == "xyzabc"
    assert choice["logprobs"] == {
        "tokens": ["x", "y", "z", "a", "b", "c"],
        "token_logprobs": [None, -1.5, -1.5, *LEGACY["token_logprobs"]],
        "top_logprobs": [None, {"c": -0.5, "y": -1.5}, {"c": -0.5, "z": -1.5}, *LEGACY["top_logprobs"]],
        "text_offset": [0, 1, 2, 3, 4, 5],
    }
    pieces = stream(body)
    assert joined(pieces) == choice["logprobs"]
    assert pieces[0]["text"] == "xyz"


@pytest.mark.parametrize("streamed", [True, False])
def test_a_prompt_is_scored_once_for_all_its_choices(streamed: bool) -> None:
    backend = ScriptedBackend(scored)
    body = {**BODY, "prompt": ["xyz", "ab"], "echo": True, "logprobs": 1, "n": 2, "stream": streamed}
    answer = call(backend, body)
    assert [request.sampling.prompt_logprobs for request in backend.requests] == [1, None, 1, None]
    if streamed:
        pieces = [json.loads(event)["choices"][0] for event in events(answer)[:-1]]
        lists = [joined([piece for piece in pieces if piece["index"] == index]) for index in range(4)]
    else:
        lists = [choice["logprobs"] for choice in answer.json()["choices"]]
    assert [len(one["tokens"]) for one in lists] == [6, 6, 5, 5]
    assert lists[0] == lists[1]
    assert lists[2] == lists[3]


def test_a_stream_that_waits_for_its_prompts_scores_is_kept_alive() -> None:
    backend = ScriptedBackend(
        lambda request: [TextDelta("a", (A,), (score(A, -1.0),)), 0.2, *scored(request)]
    )
    body = {**BODY, "echo": True, "logprobs": 0, "stream": True}
    answer = call(backend, body, keepalive_seconds=0.03)
    assert answer.text.count(": keep-alive\n\n") >= 3
    assert answer.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("body", "path", "param", "code"),
    [
        ({**BODY, "logprobs": 21}, "/v1/completions", "logprobs", "limit_exceeded"),
        (
            {**CHAT, "logprobs": True, "top_logprobs": 21},
            "/v1/chat/completions",
            "top_logprobs",
            "limit_exceeded",
        ),
        ({**CHAT, "top_logprobs": 1}, "/v1/chat/completions", "top_logprobs", "invalid_request"),
        ({**CHAT, "logprobs": 1}, "/v1/chat/completions", "logprobs", "invalid_request"),
        ({**CHAT, "echo": True}, "/v1/chat/completions", "echo", "unsupported_parameter"),
    ],
)
def test_what_cannot_be_reported_is_refused_by_name(
    body: dict[str, Any], path: str, param: str, code: str
) -> None:
    answer = call(ScriptedBackend(scored), body, path)
    assert answer.status_code == 400
    assert (answer.json()["error"]["param"], answer.json()["error"]["code"]) == (param, code)


def test_the_operator_sets_how_many_are_reported_at_most() -> None:
    assert ask({**BODY, "logprobs": 1}, max_logprobs=1)
    answer = call(ScriptedBackend(scored), {**BODY, "logprobs": 2}, max_logprobs=1)
    assert answer.status_code == 400
    assert "max_logprobs" in answer.json()["error"]["message"]
