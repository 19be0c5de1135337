"""What the engine's statistics become outside: metrics, limits of callers, OpenTelemetry traces.

Start reading at `relay.py`. `tracing.py` is imported only where a collector is named: its packages are an extra.
"""

from service.telemetry.opening import open_tracing
from service.telemetry.relay import StatsRelay

__all__ = ["StatsRelay", "open_tracing"]
