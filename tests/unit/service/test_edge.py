"""The HTTP edge over a scripted backend: failures and timings that a real engine does not make on demand."""

import asyncio
import json
import random
import time
from collections.abc import MutableMapping, Sequence
from dataclasses import replace
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry

from service.core import (
    Event,
    Failed,
    Finished,
    GenerationRequest,
    RoutingChoice,
    RoutingOutcome,
    TextDelta,
    Usage,
)
from service.errors import (
    DeadlineExceededError,
    ExpertUnavailableError,
    QueueFullError,
    RequestFailedError,
    TwinserveError,
    UnknownExpertError,
)
from service.metrics import Metrics
from tests.unit.service.backend import END, OUTCOME, Script, ScriptedBackend, says
from tests.unit.service.edge import BODY, call, events, scripted_app


def test_a_failure_before_the_first_token_keeps_its_status_in_a_stream() -> None:
    backend = ScriptedBackend(lambda _: [Failed(QueueFullError("full", retry_after=2.2))])
    answer = call(backend, {**BODY, "stream": True})
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "3"
    assert answer.json()["error"]["code"] == "queue_full"


def test_a_failure_after_the_first_token_is_the_last_event_and_cancels_the_others() -> None:
    def answer_of(request: GenerationRequest) -> Sequence[Event | float | Exception]:
        if request.id.endswith("-0"):
            return [TextDelta("a", (1,)), Failed(RequestFailedError("NaN in the logits"))]
        return [TextDelta("b", (1,)), 5.0, END]

    backend = ScriptedBackend(answer_of)
    answer = call(backend, {**BODY, "stream": True, "n": 2})
    assert answer.status_code == 200
    told = events(answer)
    assert json.loads(told[-1])["error"]["code"] == "request_failed"
    assert "[DONE]" not in told
    assert all(script.cancelled for script in backend.scripts)


def test_a_failure_of_one_choice_is_the_answer_of_a_plain_request() -> None:
    failed: list[Event | float | Exception] = [TextDelta("a", (1,)), Failed(RequestFailedError("oops"))]
    backend = ScriptedBackend(lambda request: failed if request.id.endswith("-1") else says("fine"))
    answer = call(backend, {**BODY, "n": 2})
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "oops"


@pytest.mark.parametrize("stream", [True, False])
def test_a_fault_of_ours_tells_the_client_nothing_but_the_request_id(stream: bool) -> None:
    backend = ScriptedBackend(lambda _: [ZeroDivisionError("secret")])
    answer = call(backend, {**BODY, "stream": stream})
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert answer.headers["x-request-id"]
    assert "secret" not in answer.text


def test_a_fault_of_ours_in_a_running_stream_is_its_last_event() -> None:
    backend = ScriptedBackend(lambda _: [TextDelta("a", (1,)), ZeroDivisionError("secret")])
    answer = call(backend, {**BODY, "stream": True})
    assert json.loads(events(answer)[-1])["error"]["code"] == "internal_error"
    assert "secret" not in answer.text


def test_an_engine_that_ends_without_a_word_is_an_error_not_a_hang() -> None:
    answer = call(ScriptedBackend(lambda _: [TextDelta("a", (1,))]), BODY)
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "request_failed"


def test_a_silent_stream_is_kept_alive_with_comments() -> None:
    backend = ScriptedBackend(lambda _: [TextDelta("a", (1,)), 0.2, END])
    answer = call(backend, {**BODY, "stream": True}, keepalive_seconds=0.03)
    assert answer.text.count(": keep-alive\n\n") >= 3
    assert answer.text.endswith("data: [DONE]\n\n")


def test_a_busy_stream_has_no_comments() -> None:
    backend = ScriptedBackend(
        lambda _: [*(item for _ in range(10) for item in (TextDelta("a", (1,)), 0.01)), END]
    )
    assert ": keep-alive" not in call(backend, {**BODY, "stream": True}, keepalive_seconds=1).text


def test_empty_deltas_make_no_chunks() -> None:
    answer = call(ScriptedBackend(lambda _: says("a", "", "b")), {**BODY, "stream": True})
    texts = [json.loads(event)["choices"][0]["text"] for event in events(answer)[:-1]]
    assert texts == ["a", "b", ""]


def test_a_batch_is_admitted_whole_or_not_at_all() -> None:
    def answer_of(request: GenerationRequest) -> Sequence[Event | float | Exception]:
        if request.id.endswith("-2"):
            raise QueueFullError("full", retry_after=1)
        return [5.0, END]

    backend = ScriptedBackend(answer_of)
    assert call(backend, {**BODY, "n": 4}).status_code == 429
    assert [script.cancelled for script in backend.scripts] == [True, True]


def test_a_dead_engine_is_503_everywhere_it_matters() -> None:
    dead = ScriptedBackend(alive=False, ready=False)
    assert call(dead, BODY).status_code == 503
    for path in ("/health", "/health/live", "/health/ready"):
        answer = call(dead, None, path, "GET")
        assert answer.status_code == 503
        assert answer.json() == {"status": "engine_dead"}
    assert "twinserve_engine_up 0.0" in call(dead, None, "/metrics", "GET").text


def test_a_draining_server_lives_but_is_not_ready() -> None:
    draining = ScriptedBackend(ready=False)
    assert call(draining, None, "/health/live", "GET").status_code == 200
    assert call(draining, None, "/health/ready", "GET").status_code == 503


def test_choices_of_one_prompt_get_seeds_of_their_own_and_the_first_keeps_the_given_one() -> None:
    backend = ScriptedBackend()
    call(backend, {**BODY, "n": 3, "seed": 2**63 - 1, "prompt": ["ab", "cd"]})
    seeds = [request.sampling.seed for request in backend.requests]
    assert seeds == [2**63 - 1, 2**63, 2**63 + 1] * 2
    assert len({request.id for request in backend.requests}) == 6


def test_every_seed_of_64_bits_is_a_stream_of_its_own() -> None:
    backend = ScriptedBackend()
    asked = (0, 1, -1, 7, -7, 2**63 - 1, -(2**63))
    for seed in asked:
        call(backend, {**BODY, "seed": seed})
    draws = {random.Random(request.sampling.seed).random() for request in backend.requests}
    assert len(draws) == len(asked)
    assert all(request.sampling.seed is not None for request in backend.requests)
    wrapping = ScriptedBackend()
    call(wrapping, {**BODY, "seed": -1, "n": 3})
    assert [request.sampling.seed for request in wrapping.requests] == [2**64 - 1, 0, 1]


def gone(request: GenerationRequest) -> Sequence[Event | float | Exception]:
    raise UnknownExpertError("no expert named 'alpha'", param="gates.alpha")


def test_an_expert_that_is_retired_while_its_prompt_is_encoded_is_missed_by_the_name_it_was_asked_by() -> (
    None
):
    by_model = call(ScriptedBackend(gone), {**BODY, "model": "alpha"})
    assert by_model.status_code == 404
    assert (by_model.json()["error"]["code"], by_model.json()["error"]["param"]) == (
        "model_not_found",
        "model",
    )
    by_gate = call(ScriptedBackend(gone), {**BODY, "gates": {"alpha": 1}})
    assert by_gate.status_code == 400
    assert (by_gate.json()["error"]["code"], by_gate.json()["error"]["param"]) == (
        "unknown_expert",
        "gates.alpha",
    )


def test_an_expert_that_is_retired_under_a_question_is_a_model_that_does_not_exist() -> None:
    class Retiring(ScriptedBackend):
        async def route(
            self, prompts: Sequence[tuple[int, ...]], choice: RoutingChoice
        ) -> Sequence[RoutingOutcome]:
            raise UnknownExpertError("no expert named 'alpha'", param="gates.alpha")

    answer = call(Retiring(), {"model": "alpha", "prompt": "a"}, "/v1/route")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"


def test_sampling_fields_reach_the_engine_as_written() -> None:
    backend = ScriptedBackend()
    body = {
        **BODY,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": -1,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "frequency_penalty": -1,
        "presence_penalty": 2,
        "stop": "x",
        "stop_token_ids": [7, 8],
        "min_tokens": 2,
        "max_tokens": 9,
        "ignore_eos": True,
        "logit_bias": {"5": -100, "0": 2.5},
        "logprobs": 3,
        "priority": -7,
        "routing": {"top_k": 2, "threshold": 0.25},
    }
    call(backend, body)
    [request] = backend.requests
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 0, 0.1)
    assert (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty) == (
        1.2,
        -1,
        2,
    )
    assert (sampling.stop, sampling.stop_token_ids) == (("x",), frozenset({7, 8}))
    assert (sampling.min_tokens, sampling.max_tokens, sampling.ignore_eos) == (2, 9, True)
    assert sampling.logit_bias == ((5, -100.0), (0, 2.5))
    assert (sampling.logprobs, sampling.prompt_logprobs) == (3, None)
    assert request.priority == -7
    assert (request.routing.gates, request.routing.top_k, request.routing.threshold) == (None, 2, 0.25)


def test_a_timeout_counts_from_the_requests_arrival() -> None:
    backend = ScriptedBackend()
    before = time.monotonic()
    for body in ({**BODY, "timeout": 100, "prompt": ["ab", "cd"], "n": 2}, BODY):
        call(backend, body)
    *timed, free = (request.deadline for request in backend.requests)
    assert free is None
    assert len(set(timed)) == 1
    assert timed[0] is not None
    assert before + 100 <= timed[0] <= time.monotonic() + 100


def test_the_operators_timeout_is_the_largest_and_the_default() -> None:
    backend = ScriptedBackend()
    refused = call(backend, {**BODY, "timeout": 10.5}, max_timeout_seconds=10)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "timeout"
    assert "max_timeout_seconds" in refused.json()["error"]["message"]
    for timeout in (3, None):
        call(backend, {**BODY, "timeout": timeout}, max_timeout_seconds=10)
    left = [round((request.deadline or 0) - time.monotonic()) for request in backend.requests]
    assert left == [3, 10]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (DeadlineExceededError("late", param="timeout"), 504),
        (ExpertUnavailableError("gone", retry_after=3), 503),
    ],
)
def test_an_engine_that_gives_up_on_a_request_says_so_in_either_form(
    error: TwinserveError, status: int
) -> None:
    plain = call(ScriptedBackend(lambda _: [TextDelta("a", (1,)), Failed(error)]), BODY)
    assert (plain.status_code, plain.json()["error"]["code"]) == (status, error.code)
    early = call(ScriptedBackend(lambda _: [Failed(error)]), {**BODY, "stream": True})
    assert early.status_code == status
    assert early.headers.get("retry-after") == (None if error.retry_after is None else "3")
    late = call(ScriptedBackend(lambda _: [TextDelta("a", (1,)), Failed(error)]), {**BODY, "stream": True})
    assert json.loads(events(late)[-1])["error"]["code"] == error.code


def test_the_share_of_a_request_is_its_keys_and_does_not_tell_the_key() -> None:
    backend = ScriptedBackend()
    for headers in (
        {"Authorization": "Bearer first-key"},
        {"X-API-Key": "first-key"},
        {"Authorization": "Bearer second-key"},
    ):
        call(backend, BODY, headers=headers, api_keys="first-key,second-key")
    one, same, other = (request.client for request in backend.requests)
    assert one == same != other
    assert all("key" not in client and len(client) == 16 for client in (one, other))


def test_on_an_open_server_all_share_alike_whatever_they_send() -> None:
    backend = ScriptedBackend()
    for headers in ({}, {"Authorization": "Bearer one"}, {"X-API-Key": "two"}):
        call(backend, BODY, headers=headers)
    assert [request.client for request in backend.requests] == ["", "", ""]


def test_the_first_choice_of_each_prompt_leads_its_others() -> None:
    backend = ScriptedBackend()
    call(backend, {**BODY, "n": 3, "prompt": ["ab", "cd"]})
    ids = [request.id for request in backend.requests]
    assert [request.leader for request in backend.requests] == [None, ids[0], ids[0], None, ids[3], ids[3]]


def test_a_batch_is_cancelled_with_its_leader_last() -> None:
    order: list[str] = []

    class Watched(Script):
        def cancel(self) -> None:
            order.append("leader" if self is backend.scripts[0] else "other")
            super().cancel()

    class Watching(ScriptedBackend):
        def submit(self, request: GenerationRequest) -> Script:
            script = super().submit(request)
            self.scripts[-1] = watched = Watched(script.items)
            return watched

    backend = Watching(lambda _: [Failed(RequestFailedError("oops"))])
    call(backend, {**BODY, "n": 3})
    assert order[:3] == ["other", "other", "leader"]


def test_usage_counts_what_each_prompt_found_in_the_cache_once() -> None:
    def answer_of(request: GenerationRequest) -> Sequence[Event | float | Exception]:
        cached = 2 if request.leader is None else 3
        return [TextDelta("a", (1,)), Finished("stop", Usage(3, 1, cached), OUTCOME)]

    body = {**BODY, "n": 2, "prompt": ["abc", "def"]}
    usage = call(ScriptedBackend(answer_of), body).json()["usage"]
    assert usage == {
        "prompt_tokens": 6,
        "completion_tokens": 4,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    options = {"stream": True, "stream_options": {"include_usage": True}}
    streamed = call(ScriptedBackend(answer_of), {**body, **options})
    assert json.loads(events(streamed)[-2])["usage"] == usage


def test_an_answer_says_that_merged_weights_made_it() -> None:
    merged = Finished("stop", Usage(3, 2), replace(OUTCOME, mode="merged"))
    answer = call(ScriptedBackend(lambda _: [TextDelta("a", (1,)), merged]), BODY).json()
    assert answer["routing"]["mode"] == "merged"


def test_a_default_is_cut_to_what_fits_but_min_tokens_raises_it() -> None:
    backend = ScriptedBackend()
    call(backend, {**BODY, "prompt": "a" * 60})
    call(backend, {**BODY, "min_tokens": 20})
    assert [request.sampling.max_tokens for request in backend.requests] == [4, 20]


def test_http_counts_use_route_templates_not_paths() -> None:
    backend = ScriptedBackend()
    metrics = Metrics(CollectorRegistry())
    app = scripted_app(backend, metrics)

    async def send() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://edge") as client:
            for path in ("/v1/models/a", "/v1/models/b", "/nowhere/1", "/nowhere/2"):
                await client.get(path)
            await client.request("BREW", "/v1/models")

    asyncio.run(send())
    text = metrics.exposition("")[0].decode()
    assert 'http_requests_total{method="GET",route="/v1/models/{name:path}",status="404"} 2.0' in text
    assert 'http_requests_total{method="GET",route="unmatched",status="404"} 2.0' in text
    assert 'method="OTHER"' in text
    assert "BREW" not in text


def test_the_openapi_document_describes_every_body() -> None:
    document = call(ScriptedBackend(), None, "/openapi.json", "GET").json()
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/route", "/admin/experts"):
        body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        schema = document["components"]["schemas"][body["$ref"].rsplit("/", 1)[1]]
        assert schema["properties"]


def test_the_openapi_document_tells_what_may_come_instead_of_an_answer() -> None:
    document = call(ScriptedBackend(), None, "/openapi.json", "GET").json()
    for path in ("/v1/completions", "/v1/chat/completions"):
        responses = document["paths"][path]["post"]["responses"]
        assert responses.keys() == {
            "200",
            "400",
            "401",
            "404",
            "408",
            "409",
            "413",
            "414",
            "415",
            "429",
            "431",
            "500",
            "503",
            "504",
        }
        for status in ("400", "503", "504"):
            schema = responses[status]["content"]["application/json"]["schema"]
            assert schema["$ref"].endswith("/ErrorAnswer")


def test_a_script_is_not_cancelled_before_its_end() -> None:
    backend = ScriptedBackend(lambda _: says("a"))
    answer = call(backend, BODY)
    assert answer.json()["choices"][0]["text"] == "a"
    assert isinstance(backend.scripts[0], Script)
    assert backend.scripts[0].position == 2


def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_fault_of_ours(
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend = ScriptedBackend()
    app = scripted_app(backend, Metrics(CollectorRegistry()))
    heard = iter(({"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}))
    told: list[MutableMapping[str, Any]] = []

    async def receive() -> MutableMapping[str, Any]:
        return next(heard)

    async def send(message: MutableMapping[str, Any]) -> None:
        told.append(message)

    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/completions",
        "raw_path": b"/v1/completions",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"content-length", b"100")],
        "client": ("127.0.0.1", 1),
    }
    asyncio.run(app(scope, receive, send))
    assert told[0]["status"] == 499
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
