"""One sink for the engine's statistics, and everybody who wants them."""

import logging

from service.core import RequestStats, StepStats
from service.metrics import Metrics
from service.record import RequestRecord

_log = logging.getLogger(__name__)


class StatsRelay:
    """Tells the metrics, and each request of its own sequences; called on the engine's thread."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def on_step(self, stats: StepStats) -> None:
        """After every step."""
        self._metrics.on_step(stats)

    def on_request(self, stats: RequestStats) -> None:
        """After every ended sequence."""
        record = stats.origin
        if not isinstance(record, RequestRecord):
            self._metrics.on_request(stats)
            return
        operation = record.operation or "text_completion"
        self._metrics.on_request(stats, operation=operation, model=record.model, key=record.key)
        for tell in record.on_ended:
            try:
                tell(stats)
            except Exception:  # noqa: BLE001 the engine must not die of what is told outside
                _log.exception("an ended sequence could not be told", extra={"fields": _id(record)})


def _id(record: RequestRecord) -> dict[str, str]:
    return {"request_id": record.request_id}
