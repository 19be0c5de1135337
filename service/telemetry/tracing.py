"""Traces in OpenTelemetry's GenAI conventions, content off: a server span a request, and its sequences' stages below.

The stages come from the engine's own clock readings when a sequence has ended, so that tracing costs the engine
nothing while it works. A caller's W3C `traceparent` is honoured.
"""

import time
from collections.abc import Mapping

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from service.core import RequestStats
from service.gen_ai import PROVIDER
from service.record import RequestRecord

_EXPORT_SECONDS = 5.0
_NANOSECONDS = 1_000_000_000


class Tracing:
    """Makes the spans and sends them.

    Args:
        exporter: where they go.
    """

    def __init__(self, exporter: SpanExporter) -> None:
        named = Resource({SERVICE_NAME: "twinserve"}).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=named)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("twinserve")
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def exporting(cls, endpoint: str | None) -> "Tracing":
        """Over OTLP/HTTP to a collector's base URL; None leaves it to OpenTelemetry's own variables."""
        if endpoint is None:
            return cls(OTLPSpanExporter())
        return cls(OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces", timeout=_EXPORT_SECONDS))

    def begin(self, record: RequestRecord, method: str, path: str, headers: Mapping[str, str]) -> Span:
        """The server span of a request that has just come; its sequences will find it through the record."""
        span = self._tracer.start_span(
            f"{method} {path}",
            context=self._propagator.extract(headers, Context()),
            kind=SpanKind.SERVER,
            attributes={
                "http.request.method": method,
                "url.path": path,
                "twinserve.request_id": record.request_id,
            },
        )
        parent = set_span_in_context(span, Context())
        record.on_ended.append(lambda stats: self._stages(parent, stats))
        return span

    def end(self, span: Span, record: RequestRecord, method: str, route: str, status: int) -> None:
        """Close the server span with what has become known."""
        span.update_name(
            f"{record.operation} {record.model}".rstrip() if record.operation else f"{method} {route}"
        )
        attributes: dict[str, AttributeValue] = {"http.route": route}
        if status:
            attributes["http.response.status_code"] = status
        if record.key:
            attributes["twinserve.key"] = record.key
        if record.operation:
            attributes |= _generating(record)
        span.set_attributes(attributes)
        if status >= 500:
            span.set_attribute("error.type", str(status))
            span.set_status(Status(StatusCode.ERROR))
        span.end()

    def close(self) -> None:
        """Send what is left. Blocks for some seconds at most."""
        self._provider.shutdown()

    def _stages(self, parent: Context, stats: RequestStats) -> None:
        """Spans of one ended sequence: route, queue, prefill, decode, as far as it got."""
        arrived = time.time_ns() - round(stats.total_seconds * _NANOSECONDS)
        queue, route = stats.queue_seconds, stats.route_seconds
        begins = dict.fromkeys(("route", "queue"), 0.0)
        if queue is not None and route is not None and route <= queue:
            begins["queue"] = route
        ends = {"route": route, "queue": queue}
        if queue is not None and stats.prefill_seconds is not None:
            begins["prefill"], ends["prefill"] = queue, queue + stats.prefill_seconds
        if stats.first_token_seconds is not None and stats.decode_seconds is not None:
            begins["decode"] = stats.first_token_seconds
            ends["decode"] = stats.first_token_seconds + stats.decode_seconds
        attributes: dict[str, AttributeValue] = {
            "gen_ai.usage.input_tokens": stats.prompt_tokens,
            "gen_ai.usage.output_tokens": stats.completion_tokens,
            "gen_ai.response.finish_reasons": [stats.reason],
        }
        for name, end in ends.items():
            if end is None:
                continue
            span = self._tracer.start_span(
                name,
                context=parent,
                start_time=arrived + round(begins[name] * _NANOSECONDS),
                attributes=attributes if name == "decode" else None,
            )
            span.end(arrived + round(end * _NANOSECONDS))


def _generating(record: RequestRecord) -> dict[str, AttributeValue]:
    attributes: dict[str, AttributeValue] = {
        "gen_ai.operation.name": record.operation,
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.completion_tokens,
        "gen_ai.response.finish_reasons": list(record.reasons),
        "gen_ai.request.choice.count": record.sequences,
        "twinserve.pattern": list(record.patterns),
        "twinserve.generations": [f"{name}@{number}" for name, number in sorted(record.generations.items())],
    }
    if record.model:
        attributes["gen_ai.request.model"] = attributes["gen_ai.response.model"] = record.model
    if record.first_token is not None:
        attributes["gen_ai.response.time_to_first_chunk"] = record.first_token - record.arrived
    return attributes
