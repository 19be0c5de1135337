import json
from typing import Any

import openai
import pytest

from tests.api.harness import Served, counts

COMPLETION: dict[str, Any] = {"model": "tiny", "prompt": "Add 3 and 4.", "max_tokens": 24, "seed": 5}
CHAT: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Add 3 and 4."}],
    "max_tokens": 24,
    "seed": 5,
}


def test_a_streamed_completion_is_the_whole_one_in_pieces(client: openai.OpenAI) -> None:
    whole = client.completions.create(**COMPLETION)
    chunks = list(client.completions.create(**COMPLETION, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].model_dump()["routing"] == whole.model_dump()["routing"]
    assert len(chunks) > 3
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_streamed_chat_is_the_whole_one_in_pieces(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**CHAT)
    chunks = list(client.chat.completions.create(**CHAT, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].object == "chat.completion.chunk"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].model_dump()["routing"] == whole.model_dump()["routing"]


def test_usage_comes_last_when_asked_for(server: Served) -> None:
    whole = server.complete(**COMPLETION)
    chunks = server.chunks("/v1/completions", {**COMPLETION, "stream_options": {"include_usage": True}})
    assert chunks[-1]["choices"] == []
    assert counts(chunks[-1]) == counts(whole)
    assert chunks[-1]["routing"] == chunks[-2]["routing"] == whole["routing"]
    assert all("usage" not in chunk for chunk in chunks[:-1])
    assert all("usage" not in chunk for chunk in server.chunks("/v1/completions", COMPLETION))


def test_a_stream_of_several_prompts_and_choices_interleaves_them_by_index(server: Served) -> None:
    body = {**COMPLETION, "prompt": ["Add 3 and 4.", "SORT: green zebra"], "n": 2}
    whole = server.complete(**body)
    texts = ["", "", "", ""]
    ends = {}
    for chunk in server.chunks("/v1/completions", body):
        [choice] = chunk["choices"]
        texts[choice["index"]] += choice["text"]
        if choice["finish_reason"]:
            ends[choice["index"]] = choice["routing"]
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert ends == {choice["index"]: choice["routing"] for choice in whole["choices"]}


def test_the_events_are_plain_sse_and_end_with_done(server: Served) -> None:
    with server.http.stream("POST", "/v1/completions", json={**COMPLETION, "stream": True}) as answer:
        assert answer.headers["cache-control"] == "no-cache"
        assert "content-length" not in answer.headers
        assert answer.headers["x-request-id"]
        body = answer.read().decode()
    events = body.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    for event in events[:-2]:
        assert json.loads(event.removeprefix("data: "))["object"] == "text_completion"


@pytest.mark.parametrize("change", [{"model": "nobody"}, {"max_tokens": 100_000}, {"prompt": ""}])
def test_a_refusal_of_a_stream_is_an_ordinary_http_error(server: Served, change: dict[str, Any]) -> None:
    answer = server.post("/v1/completions", {**COMPLETION, "stream": True, **change})
    assert answer.status_code in (400, 404)
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["error"]["param"] in ("model", "max_tokens", "prompt")
