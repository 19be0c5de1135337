import builtins
import contextvars
import json
import logging
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from service.core import RequestStats
from service.logs import JsonFormatter
from service.metrics import OTHER, Metrics
from service.record import RequestRecord, enter
from service.settings import Settings
from service.telemetry import StatsRelay, open_tracing
from tests.unit.service.test_metrics import STEP

STATS = RequestStats("length", 5, 7, 0.1, None, 0.2, 0.3, 0.25, 0.6, {})


def recorded(**fields: Any) -> RequestRecord:
    return RequestRecord("r", 0.0, **fields)


def read(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_an_ended_sequence_is_told_to_the_metrics_and_to_its_request() -> None:
    metrics = Metrics(CollectorRegistry())
    told: list[RequestStats] = []
    record = recorded(key="alice", model="tiny", operation="chat")
    record.on_ended.append(told.append)
    relay = StatsRelay(metrics)
    relay.on_request(replace(STATS, origin=record))
    relay.on_request(replace(STATS, origin=record, leads=False))
    relay.on_request(replace(STATS, reason="timeout", origin=record))
    relay.on_request(STATS)
    relay.on_step(STEP)
    assert [stats.reason for stats in told] == ["length", "length", "timeout"]
    labels = {
        "gen_ai_operation_name": "chat",
        "gen_ai_provider_name": "twinserve",
        "gen_ai_request_model": "tiny",
    }
    name = "gen_ai_server_request_duration_seconds_count"
    assert read(metrics, name, error_type="", **labels) == 2
    assert read(metrics, name, error_type="timeout", **labels) == 1
    assert read(metrics, "gen_ai_server_time_to_first_token_seconds_sum", **labels) == 0.5
    each = read(metrics, "gen_ai_server_time_per_output_token_seconds_sum", **labels)
    assert each == pytest.approx(2 * 0.3 / 6)
    assert read(metrics, "twinserve_key_tokens_total", key="alice", kind="prompt") == 10
    assert read(metrics, "twinserve_key_tokens_total", key="alice", kind="generated") == 21
    assert read(metrics, "twinserve_steps_total", mode="factored") == 1
    assert read(metrics, "twinserve_request_success_total", finished_reason="length") == 3


def test_the_engine_does_not_die_of_what_it_tells(caplog: pytest.LogCaptureFixture) -> None:
    told: list[RequestStats] = []
    record = recorded()

    def fail(_: RequestStats) -> None:
        raise ZeroDivisionError

    record.on_ended += [fail, told.append]
    StatsRelay(Metrics(CollectorRegistry())).on_request(replace(STATS, origin=record))
    assert len(told) == 1
    assert "ended sequence" in caplog.text


def test_labels_of_keys_and_models_are_bounded() -> None:
    metrics = Metrics(CollectorRegistry(), expert_labels=2)
    for number in range(5):
        metrics.on_http("POST", "/v1/completions", 200, 0.1, f"key-{number}")
        metrics.on_request(STATS, model=f"model-{number}", key=f"key-{number}")
    assert read(metrics, "twinserve_key_requests_total", key="key-1") == 1
    assert read(metrics, "twinserve_key_requests_total", key="key-2") is None
    assert read(metrics, "twinserve_key_requests_total", key=OTHER) == 3
    labels = {"gen_ai_operation_name": "text_completion", "gen_ai_provider_name": "twinserve"}
    name = "gen_ai_server_time_to_first_token_seconds_count"
    assert read(metrics, name, gen_ai_request_model=OTHER, **labels) == 3


def test_refusals_at_the_edge_are_counted_by_reason() -> None:
    metrics = Metrics(CollectorRegistry())
    for limit in ("requests", "tokens", "concurrent"):
        assert read(metrics, "twinserve_rate_limited_total", limit=limit) == 0
        metrics.on_rate_limited(limit)
        assert read(metrics, "twinserve_rate_limited_total", limit=limit) == 1
    for reason in ("header", "slow_header", "stalled"):
        assert read(metrics, "twinserve_connections_refused_total", reason=reason) == 0
        metrics.on_connection_refused(reason)
        assert read(metrics, "twinserve_connections_refused_total", reason=reason) == 1


def test_a_line_that_is_logged_for_a_request_carries_its_id() -> None:
    def line(**extra: Any) -> dict[str, Any]:
        record = logging.LogRecord("x", logging.INFO, "", 0, "told", (), None)
        record.__dict__.update(extra)
        return dict(json.loads(JsonFormatter().format(record)))

    def served() -> None:
        enter(recorded())
        assert line()["request_id"] == "r"
        assert line(fields={"request_id": "own", "a": 1})["request_id"] == "own"

    contextvars.copy_context().run(served)
    assert "request_id" not in line()


def test_without_a_collector_there_is_no_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    assert open_tracing(Settings()) is None


def test_the_standard_variable_turns_tracing_on_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    tracing = open_tracing(Settings())
    assert tracing is not None
    tracing.close()


def test_a_collector_without_the_packages_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name.startswith("service.telemetry.tracing"):
            raise ModuleNotFoundError("No module named 'opentelemetry'", name="opentelemetry")
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"pip install 'twinserve\[otel\]'"):
        open_tracing(Settings(otlp_endpoint="http://127.0.0.1:4318"))
