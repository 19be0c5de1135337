"""Log lines: one a record, text or JSON. Knows no HTTP; what a record carries is the caller's business.

Extra fields go in `extra={"fields": {...}}` and end up as `key=value` or JSON members. What is logged while a
request is served carries its id.
"""

import json
import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

from service.record import current


def _fields(record: logging.LogRecord) -> Mapping[str, Any]:
    fields = getattr(record, "fields", None)
    told: Mapping[str, Any] = fields if isinstance(fields, Mapping) else {}
    served = current()
    if served is None or "request_id" in told:
        return told
    return {"request_id": served.request_id, **told}


def _utc(seconds: float | None) -> time.struct_time:
    return time.gmtime(seconds)


def _one_line(text: str) -> str:
    """Control characters escaped: a client must not be able to write log lines of its own."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class TextFormatter(logging.Formatter):
    """`2026-01-31T12:00:00Z INFO service.api: text key=value`, a traceback below if there is one."""

    converter = staticmethod(_utc)

    def format(self, record: logging.LogRecord) -> str:
        """The record as text."""
        stamp = self.formatTime(record, "%Y-%m-%dT%H:%M:%SZ")
        line = f"{stamp} {record.levelname} {record.name}: {record.getMessage()}"
        line += "".join(f" {key}={value}" for key, value in _fields(record).items())
        line = _one_line(line)
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One JSON object a record."""

    converter = staticmethod(_utc)

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON."""
        entry: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str, ensure_ascii=False)


def configure_logging(level: str, as_json: bool) -> None:
    """Send every logger to standard error in one form; call once, from the command.

    Args:
        level: debug, info, warning or error.
        as_json: JSON lines instead of text.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for noisy in ("httpx", "urllib3", "filelock", "asyncio"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, logging.getLogger().level))
