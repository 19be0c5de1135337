"""Tracing, where somebody has named a collector."""

import os
from typing import TYPE_CHECKING

from service.settings import ENV_PREFIX, Settings

if TYPE_CHECKING:
    from service.telemetry.tracing import Tracing

_STANDARD = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
"""OpenTelemetry's own variables, which its exporter reads itself with all their kin."""


def open_tracing(settings: Settings) -> "Tracing | None":
    """What sends traces to the collector that the settings or OpenTelemetry's own variables name; None without one.

    Raises:
        ValueError: one is named, but OpenTelemetry is not installed.
    """
    named = settings.otlp_endpoint is not None or any(os.environ.get(name) for name in _STANDARD)
    if not named:
        return None
    try:
        from service.telemetry.tracing import Tracing
    except ImportError as error:
        raise ValueError(
            f"{ENV_PREFIX}OTLP_ENDPOINT or {_STANDARD[1]} is set, but {error.name} is not installed: "
            "pip install 'twinserve[otel]', or unset it"
        ) from error
    return Tracing.exporting(settings.otlp_endpoint)
