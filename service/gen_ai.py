"""The names, buckets and words of OpenTelemetry's conventions for generative models, as Prometheus writes them."""

from prometheus_client import CollectorRegistry, Histogram

from service.core import RequestStats

PROVIDER = "twinserve"

WELL = ("stop", "length")
"""Reasons of an end that is no error."""

_REQUEST = (
    0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92,
)  # fmt: skip
_FIRST_TOKEN = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
)  # fmt: skip
_OUTPUT_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)

_LABELS = ("gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model")


class GenAiMetrics:
    """The three histograms of a server; part of `Metrics`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def histogram(
            name: str, text: str, buckets: tuple[float, ...], more: tuple[str, ...] = ()
        ) -> Histogram:
            full = f"gen_ai_server_{name}_seconds"
            return Histogram(full, text, (*_LABELS, *more), buckets=buckets, registry=registry)

        self._request = histogram("request_duration", "Arrival to last token.", _REQUEST, ("error_type",))
        self._first = histogram(
            "time_to_first_token", "Arrival to first token, of those that ended well.", _FIRST_TOKEN
        )
        self._output = histogram(
            "time_per_output_token", "Each token after the first, of those.", _OUTPUT_TOKEN
        )

    def on_request(self, stats: RequestStats, operation: str, model: str, error: str) -> None:
        """Record one ended sequence; `error` is empty where it ended well."""
        labels = (operation, PROVIDER, model)
        self._request.labels(*labels, error).observe(stats.total_seconds)
        if error:
            return
        if stats.first_token_seconds is not None:
            self._first.labels(*labels).observe(stats.first_token_seconds)
        if stats.decode_seconds is not None and stats.completion_tokens > 1:
            self._output.labels(*labels).observe(stats.decode_seconds / (stats.completion_tokens - 1))
