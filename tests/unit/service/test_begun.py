"""A stream that waits long for its first token starts without it, and what comes of it is told in events."""

import json

import pytest

from service.core import Failed, TextDelta
from service.errors import ExpertUnavailableError, QueueFullError, TwinserveError
from tests.unit.service.backend import END, ScriptedBackend, says
from tests.unit.service.edge import BODY, call, events

STREAM = {**BODY, "stream": True}


def test_a_long_wait_is_filled_with_comments_and_the_answer_is_the_same() -> None:
    waiting = call(ScriptedBackend(lambda _: [0.2, *says("a", "b")]), STREAM, keepalive_seconds=0.03)
    quick = call(ScriptedBackend(lambda _: says("a", "b")), STREAM)
    assert waiting.status_code == 200
    assert waiting.text.startswith(": keep-alive\n\n")
    assert waiting.text.count(": keep-alive\n\n") >= 3
    texts = [
        [json.loads(event)["choices"] for event in events(answer) if event.startswith("{")]
        for answer in (waiting, quick)
    ]
    assert texts[0] == texts[1]
    assert waiting.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("error", [QueueFullError("full"), ExpertUnavailableError("gone", retry_after=3)])
def test_what_fails_after_a_long_wait_is_an_event_and_within_a_short_one_a_status(
    error: TwinserveError,
) -> None:
    late = call(ScriptedBackend(lambda _: [0.1, Failed(error)]), STREAM, keepalive_seconds=0.02)
    assert late.status_code == 200
    assert json.loads(events(late)[-1])["error"]["code"] == error.code
    early = call(ScriptedBackend(lambda _: [0.02, Failed(error)]), STREAM, keepalive_seconds=5)
    assert early.status_code == error.status


def test_a_plain_answer_keeps_its_status_however_long_it_takes() -> None:
    backend = ScriptedBackend(lambda _: [0.1, Failed(QueueFullError("full"))])
    assert call(backend, BODY, keepalive_seconds=0.02).status_code == 429


def test_one_choice_that_is_ready_starts_a_stream_for_all() -> None:
    def answer_of(request: object) -> list[object]:
        quick = str(getattr(request, "id", "")).endswith("-0")
        return [TextDelta("a", (1,)), END] if quick else [0.1, TextDelta("b", (2,)), END]

    answer = call(ScriptedBackend(answer_of), {**STREAM, "n": 2}, keepalive_seconds=5)  # type: ignore[arg-type]
    assert ": keep-alive" not in answer.text
    assert answer.text.endswith("data: [DONE]\n\n")
