"""What the log tells of a request, and what it never tells."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest

from service.logs import JsonFormatter
from tests.api.harness import Served, eventually, serving
from tests.fixtures.tiny import TinyFamily

SECRET = "whisper"
BODY: dict[str, Any] = {"model": "alpha", "prompt": f"Add {SECRET}.", "max_tokens": 5, "ignore_eos": True}


@pytest.fixture(scope="module")
def keyed(family: TinyFamily) -> Iterator[Served]:
    with serving(family.bundle, api_keys="alice = a-key") as served:
        served.http.headers["Authorization"] = "Bearer a-key"
        yield served


def access(caplog: pytest.LogCaptureFixture, request_id: str) -> list[dict[str, Any]]:
    """The fields of the access lines of one request."""
    return [
        record.fields  # type: ignore[attr-defined]
        for record in list(caplog.records)
        if record.name == "service.access" and record.fields["request_id"] == request_id  # type: ignore[attr-defined]
    ]


def asked(
    caplog: pytest.LogCaptureFixture,
    served: Served,
    request_id: str,
    body: Any,
    path: str = "/v1/completions",
) -> dict[str, Any]:
    with caplog.at_level(logging.DEBUG):
        served.post(path, body, headers={"X-Request-Id": request_id})
        assert eventually(lambda: bool(access(caplog, request_id)))
    [fields] = access(caplog, request_id)
    return fields


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_one_line_when_it_ends(
    caplog: pytest.LogCaptureFixture, keyed: Served, stream: bool
) -> None:
    fields = asked(caplog, keyed, f"one-{stream}", {**BODY, "stream": stream})
    assert fields["status"] == 200
    assert (fields["key"], fields["model"]) == ("alice", "alpha")
    assert fields["completion_tokens"] == 5
    assert fields["prompt_tokens"] > 1
    assert fields["finish_reasons"] == "length"
    assert fields["pattern"] == "alpha@1:1"
    assert 0 < fields["first_token_seconds"] <= fields["seconds"]


def test_a_refusal_is_one_line_too(caplog: pytest.LogCaptureFixture, keyed: Served) -> None:
    fields = asked(caplog, keyed, "refused", {**BODY, "max_tokens": -1})
    assert fields["status"] == 400
    assert "completion_tokens" not in fields


@pytest.mark.parametrize(
    "body",
    [
        BODY,
        {**BODY, "stream": True},
        {**BODY, "max_tokens": -1},
        {**BODY, "prompt": {"text": SECRET}},
        {**BODY, "prompt": [SECRET, 1]},
        {**BODY, "model": "nobody"},
        {**BODY, "stop": [SECRET] * 100},
        {**BODY, "timeout": 1e-9},
        {**BODY, "user": SECRET},
        [SECRET],
        {"model": "alpha", "messages": [{"role": "user", "content": SECRET}], "max_tokens": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/route"])
def test_no_prompt_is_ever_logged(
    caplog: pytest.LogCaptureFixture, keyed: Served, body: Any, path: str
) -> None:
    request_id = f"quiet-{path}-{abs(hash(str(body)))}"
    asked(caplog, keyed, request_id, body, path)
    logged = "\n".join(JsonFormatter().format(record) for record in list(caplog.records))
    assert request_id in logged
    assert SECRET not in logged
    assert "a-key" not in logged


def test_prompts_are_logged_where_the_operator_wants_them(
    caplog: pytest.LogCaptureFixture, family: TinyFamily
) -> None:
    with serving(family.bundle, log_prompts=True) as served:
        asked(caplog, served, "loud", BODY)
        [line] = [JsonFormatter().format(r) for r in list(caplog.records) if r.message == "request body"]
        assert SECRET in line


def test_gen_ai_metrics_count_each_sequence_by_operation_and_model(server: Served) -> None:
    server.complete(model="gamma", max_tokens=3, ignore_eos=True, n=2)
    labels = 'gen_ai_operation_name="text_completion",gen_ai_provider_name="twinserve",gen_ai_request_model="gamma"'
    first = f"gen_ai_server_time_to_first_token_seconds_count{{{labels}}}"
    assert eventually(lambda: first in server.http.get("/metrics").text)
    assert eventually(lambda: server.metric(first) >= 2)
    whole = f'gen_ai_server_request_duration_seconds_count{{error_type="",{labels}}}'
    assert server.metric(whole) == server.metric(first)
    assert server.metric(f"gen_ai_server_time_per_output_token_seconds_count{{{labels}}}") >= 2


def test_pages_of_other_origins_are_let_in_only_where_the_operator_says_so(
    server: Served, family: TinyFamily
) -> None:
    page = {"Origin": "https://pages.example"}
    preflight = {
        **page,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    assert "access-control-allow-origin" not in server.http.get("/v1/models", headers=page).headers
    assert server.http.options("/v1/completions", headers=preflight).status_code == 405
    with serving(family.bundle, api_keys="a-key", cors_origins="https://pages.example") as served:
        allowed = served.http.options("/v1/completions", headers=preflight)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://pages.example"
        assert "Authorization" in allowed.headers["access-control-allow-headers"]
        refused = served.http.get("/v1/models", headers=page)
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://pages.example"
        other = {**preflight, "Origin": "https://else.example"}
        assert served.http.options("/v1/completions", headers=other).status_code == 400
        answer = served.http.get("/v1/models", headers={**page, "Authorization": "Bearer a-key"})
        assert answer.status_code == 200
        assert "X-Request-Id" in answer.headers["access-control-expose-headers"]
        assert "access-control-allow-credentials" not in answer.headers
