"""Traces, as a collector gets them: over OTLP/HTTP, decoded from the protobuf."""

import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tests.api.harness import Served, eventually, serving
from tests.fixtures.tiny import TinyFamily

PROMPT = "Add 1 and 2, secretly."
BODY: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 6, "ignore_eos": True}
STAGES = ("route", "queue", "prefill", "decode")


class Collector:
    """A collector on loopback that keeps what it gets."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.resources: list[dict[str, Any]] = []
        self.raw = b""
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                collector.take(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def take(self, call: BaseHTTPRequestHandler) -> None:
        assert call.path == "/v1/traces"
        body = call.rfile.read(int(call.headers["Content-Length"]))
        if call.headers["Content-Encoding"] == "gzip":
            body = gzip.decompress(body)
        told = ExportTraceServiceRequest.FromString(body)
        self.raw += body
        for resource in told.resource_spans:
            self.resources.append(values(resource.resource.attributes))
            for scope in resource.scope_spans:
                self.spans += scope.spans
        answer = ExportTraceServiceResponse().SerializeToString()
        call.send_response(200)
        call.send_header("Content-Type", "application/x-protobuf")
        call.send_header("Content-Length", str(len(answer)))
        call.end_headers()
        call.wfile.write(answer)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def trace(self, request_id: str) -> tuple[Span, list[Span]]:
        """The server span of a request, and what lies below it."""
        [top] = [
            span for span in self.spans if values(span.attributes).get("twinserve.request_id") == request_id
        ]
        return top, [span for span in self.spans if span.parent_span_id == top.span_id]


def plain(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [plain(item) for item in value.array_value.values]
    return getattr(value, str(kind))


def values(attributes: Any) -> dict[str, Any]:
    return {pair.key: plain(pair.value) for pair in attributes}


@pytest.fixture(scope="module")
def traced(family: TinyFamily) -> Iterator[Collector]:
    """What a collector has got when a server that was asked these things has stopped."""
    collector = Collector()
    try:
        with serving(family.bundle, otlp_endpoint=collector.url, api_keys="alice = a-key") as served:
            served.http.headers["Authorization"] = "Bearer a-key"
            asked(served)
        yield collector
    finally:
        collector.close()


def asked(served: Served) -> None:
    def post(path: str, body: dict[str, Any], request_id: str, **headers: str) -> httpx.Response:
        return served.post(path, body, headers={"X-Request-Id": request_id, **headers})

    assert post("/v1/completions", BODY, "plain").status_code == 200
    messages = [{"role": "user", "content": PROMPT}]
    chat = {"model": "alpha", "messages": messages, "max_tokens": 3, "stream": True, "ignore_eos": True}
    assert post("/v1/chat/completions", chat, "chat").status_code == 200
    assert post("/v1/completions", {**BODY, "n": 2}, "two").status_code == 200
    assert post("/v1/completions", {**BODY, "max_tokens": -1}, "refused").status_code == 400
    assert post("/v1/completions", {**BODY, "timeout": 1e-9}, "late").status_code == 504
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    assert post("/v1/completions", BODY, "child", traceparent=parent).status_code == 200
    with served.http.stream(
        "POST",
        "/v1/completions",
        json={**BODY, "stream": True, "max_tokens": 200},
        headers={"X-Request-Id": "gone"},
    ) as answer:
        next(answer.iter_lines())
    assert eventually(lambda: served.runtime.gauges().running == 0)
    assert served.http.get("/health").status_code == 200
    assert served.http.get("/v1/models", headers={"X-Request-Id": "models"}).status_code == 200


def test_a_request_is_a_server_span_in_the_words_of_the_conventions(traced: Collector) -> None:
    top, _ = traced.trace("plain")
    told = values(top.attributes)
    assert (top.name, top.kind) == ("text_completion tiny", Span.SPAN_KIND_SERVER)
    assert told["gen_ai.operation.name"] == "text_completion"
    assert told["gen_ai.request.model"] == "tiny"
    assert told["gen_ai.provider.name"] == "twinserve"
    assert told["gen_ai.usage.output_tokens"] == 6
    assert told["gen_ai.usage.input_tokens"] > 1
    assert told["gen_ai.response.finish_reasons"] == ["length"]
    assert told["http.response.status_code"] == 200
    assert told["http.route"] == "/v1/completions"
    assert told["twinserve.key"] == "alice"
    assert len(told["twinserve.pattern"]) == 1
    assert all("@1" in generation for generation in told["twinserve.generations"])
    assert not top.parent_span_id
    assert traced.resources[0]["service.name"] == "twinserve"


@pytest.mark.parametrize(("request_id", "stages"), [("plain", STAGES), ("chat", STAGES[1:]), ("two", STAGES)])
def test_its_stages_lie_below_it_in_time(traced: Collector, request_id: str, stages: tuple[str, ...]) -> None:
    top, below = traced.trace(request_id)
    assert {span.name for span in below} == set(stages)
    slack = 50_000_000
    for span in below:
        assert span.trace_id == top.trace_id
        assert top.start_time_unix_nano - slack <= span.start_time_unix_nano <= span.end_time_unix_nano
        assert span.end_time_unix_nano <= top.end_time_unix_nano + slack
    firsts = {name: next(span for span in below if span.name == name) for name in stages}
    assert firsts["queue"].end_time_unix_nano <= firsts["prefill"].end_time_unix_nano
    assert abs(firsts["prefill"].end_time_unix_nano - firsts["decode"].start_time_unix_nano) < slack


def test_a_chat_is_named_so_and_its_expert_is_told(traced: Collector) -> None:
    top, _ = traced.trace("chat")
    told = values(top.attributes)
    assert (top.name, told["gen_ai.operation.name"]) == ("chat alpha", "chat")
    assert told["gen_ai.usage.output_tokens"] == 3
    assert told["twinserve.generations"] == ["alpha@1"]
    assert told["gen_ai.response.time_to_first_chunk"] > 0


def test_each_sequence_has_its_own_stages_and_a_prompt_counts_once(traced: Collector) -> None:
    top, below = traced.trace("two")
    decodes = [values(span.attributes) for span in below if span.name == "decode"]
    assert [told["gen_ai.usage.output_tokens"] for told in decodes] == [6, 6]
    told, alone = values(top.attributes), values(traced.trace("plain")[0].attributes)
    assert told["gen_ai.usage.output_tokens"] == 12
    assert told["gen_ai.usage.input_tokens"] == alone["gen_ai.usage.input_tokens"]


def test_the_callers_trace_goes_on(traced: Collector) -> None:
    top, below = traced.trace("child")
    assert top.trace_id.hex() == "0af7651916cd43dd8448eb211c80319c"
    assert top.parent_span_id.hex() == "b7ad6b7169203331"
    assert {span.trace_id for span in below} == {top.trace_id}


def test_a_refusal_has_no_stages_and_a_fault_of_ours_is_an_error(traced: Collector) -> None:
    top, below = traced.trace("refused")
    assert not below
    assert values(top.attributes)["http.response.status_code"] == 400
    assert top.status.code == Status.STATUS_CODE_UNSET
    late, _ = traced.trace("late")
    assert late.status.code == Status.STATUS_CODE_ERROR
    assert values(late.attributes)["error.type"] == "504"


def test_a_client_that_left_is_traced_to_its_end(traced: Collector) -> None:
    top, below = traced.trace("gone")
    assert {span.name for span in below} == set(STAGES)
    [decode] = [span for span in below if span.name == "decode"]
    assert values(decode.attributes)["gen_ai.response.finish_reasons"] == ["cancelled"]
    assert 0 < values(top.attributes)["gen_ai.usage.output_tokens"] < 200


def test_what_generates_nothing_is_named_by_its_route_and_probes_are_not_traced(traced: Collector) -> None:
    assert traced.trace("models")[0].name == "GET /v1/models"
    assert not [span for span in traced.spans if "health" in span.name]


def test_no_text_of_a_prompt_leaves_the_server(traced: Collector) -> None:
    assert traced.raw
    assert b"secretly" not in traced.raw
    assert b"a-key" not in traced.raw


def test_a_collector_that_is_not_there_costs_nobody_an_answer(family: TinyFamily) -> None:
    with serving(family.bundle, otlp_endpoint="http://127.0.0.1:9") as served:
        assert served.complete(max_tokens=2)
