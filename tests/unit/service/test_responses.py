"""Responses and embeddings over a scripted backend: failures that a real engine does not make on demand."""

import json
from typing import Any

import httpx
import pytest

from service.api.call_reader import CallReader
from service.api.response_output import OutputWriter
from service.core import Failed, Finished, GenerationRequest, TextDelta, Usage
from service.errors import QueueFullError, RequestFailedError
from tests.unit.service.backend import END, OUTCOME, ScriptedBackend, says
from tests.unit.service.edge import call

BODY = {"model": "family", "input": "abc"}
CUT = Finished("length", Usage(3, 2), OUTCOME)


def told(answer: httpx.Response) -> list[dict[str, Any]]:
    """Events of a stream, numbered from 0."""
    blocks = [block for block in answer.text.split("\n\n") if block]
    found = [json.loads(block.split("\ndata: ")[1]) for block in blocks]
    assert [block.split("\n")[0] for block in blocks] == [f"event: {each['type']}" for each in found]
    assert [each["sequence_number"] for each in found] == list(range(len(found)))
    return found


def test_a_failure_before_the_first_token_keeps_its_status() -> None:
    backend = ScriptedBackend(lambda _: [Failed(QueueFullError("full", retry_after=2.2))])
    for stream in (False, True):
        answer = call(backend, {**BODY, "stream": stream}, "/v1/responses")
        assert answer.status_code == 429
        assert answer.json()["error"]["code"] == "queue_full"


@pytest.mark.parametrize(
    ("fault", "says_why", "code"),
    [
        (Failed(RequestFailedError("NaN in the logits")), "NaN in the logits", "request_failed"),
        (RuntimeError("a secret"), "The server failed on this request", "internal_error"),
    ],
)
def test_a_failure_on_the_way_ends_the_stream_as_a_failed_response(fault, says_why, code) -> None:
    backend = ScriptedBackend(lambda _: [TextDelta("a", (1,)), fault])
    answer = call(backend, {**BODY, "stream": True}, "/v1/responses")
    assert answer.status_code == 200
    events = told(answer)
    assert events[-1]["type"] == "response.failed"
    last = events[-1]["response"]
    assert last["status"] == "failed"
    assert says_why in last["error"]["message"]
    assert last["error"]["type"] == code
    assert "secret" not in answer.text
    assert [(item["status"], item["content"][0]["text"]) for item in last["output"]] == [("incomplete", "a")]
    assert backend.scripts[0].cancelled


def test_a_model_that_says_nothing_answers_with_an_empty_text() -> None:
    answer = call(ScriptedBackend(lambda _: [END]), BODY, "/v1/responses").json()
    assert answer["status"] == "completed"
    assert [part["text"] for part in answer["output"][0]["content"]] == [""]


def test_a_whole_response_is_what_its_stream_adds_up_to() -> None:
    backend = ScriptedBackend(lambda _: [*says("a", "", "b")[:-1], CUT])
    whole = call(backend, BODY, "/v1/responses").json()
    events = told(call(backend, {**BODY, "stream": True}, "/v1/responses"))
    assert events[-1]["type"] == "response.incomplete"
    assert whole["status"] == "incomplete"
    assert whole["output"][0]["content"] == events[-1]["response"]["output"][0]["content"]
    assert whole["usage"] == events[-1]["response"]["usage"]


def test_texts_and_calls_become_items_in_their_order() -> None:
    reader = CallReader({"look"}, "<tool_call>", "</tool_call>", parallel=True)
    writer = OutputWriter(reader, None)
    text = (
        'So: <tool_call>{"name": "look", "arguments": {"a": 1}}</tool_call>\n'
        '<tool_call>{"name": "look", "arguments": {"a": 2}}</tool_call> Done.'
    )
    events = [event for letter in text for event in writer.take(TextDelta(letter, (1,)))]
    events += writer.finish(END)
    kinds = [item.type for item in writer.items]
    assert kinds == ["message", "function_call", "function_call", "message"]
    said, one, two, after = writer.items
    assert said.content[0].text == "So:"
    assert json.loads(one.arguments) == {"a": 1}
    assert json.loads(two.arguments) == {"a": 2}
    assert one.call_id != two.call_id
    assert after.content[0].text.strip() == "Done."
    assert all(item.status == "completed" for item in writer.items)
    for place, item in enumerate(writer.items):
        own = [event for event in events if event["output_index"] == place]
        assert own[0]["type"] == "response.output_item.added"
        assert own[-1] == {
            "type": "response.output_item.done",
            "output_index": place,
            "item": item.model_dump(),
        }
        deltas = "".join(event["delta"] for event in own if event["type"].endswith(".delta"))
        assert deltas == (item.arguments if item.type == "function_call" else item.content[0].text)


def test_one_input_that_fails_ends_the_request_for_embeddings() -> None:
    def answer_of(request: GenerationRequest) -> list[Any]:
        if request.prompt_ids[0] == ord("b"):
            return [Failed(RequestFailedError("NaN in the states"))]
        return [5.0, END]

    backend = ScriptedBackend(answer_of)
    answer = call(backend, {"model": "family", "input": ["a", "b", "c"]}, "/v1/embeddings")
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "request_failed"
    assert all(script.cancelled for script in backend.scripts)


def test_vectors_of_length_zero_stay_as_they_are() -> None:
    nothing = Finished("stop", Usage(3, 0), OUTCOME, pooled=(0.0, 0.0))
    answer = call(ScriptedBackend(lambda _: [nothing]), BODY, "/v1/embeddings")
    assert answer.json()["data"][0]["embedding"] == [0.0, 0.0]


def test_inputs_are_queued_a_batch_at_a_time() -> None:
    waiting: list[int] = []

    def answer_of(request: GenerationRequest) -> list[Any]:
        waiting.append(sum(script.position < len(script.items) for script in backend.scripts) + 1)
        return [0.01, Finished("stop", Usage(1, 0), OUTCOME, pooled=(3.0, 4.0))]

    backend = ScriptedBackend(answer_of)
    body = {"model": "family", "input": [[index] for index in range(9)]}
    answer = call(backend, body, "/v1/embeddings", max_batch=4)
    assert [item["index"] for item in answer.json()["data"]] == list(range(9))
    assert [request.prompt_ids for request in backend.requests] == [(index,) for index in range(9)]
    assert answer.json()["data"][8]["embedding"] == pytest.approx([0.6, 0.8])
    assert max(waiting) == 4
