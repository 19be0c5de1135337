import json
import logging
import sys
from typing import Any

import pytest

from service.logs import JsonFormatter, TextFormatter


def record(message: str, **extra: Any) -> logging.LogRecord:
    made = logging.LogRecord("service.access", logging.INFO, "file", 1, message, (), None)
    made.__dict__.update(extra)
    return made


def test_a_client_cannot_write_log_lines_of_its_own() -> None:
    line = TextFormatter().format(record("GET /a\n2026 ERROR forged\x1b[31m", fields={"id": "x\ny"}))
    assert "\n" not in line
    assert "\x1b" not in line
    assert line.endswith("id=x\\ny")
    assert "\n" not in JsonFormatter().format(record("GET /a\nb"))


def test_fields_are_members_of_the_json_object() -> None:
    entry = json.loads(JsonFormatter().format(record("GET /", fields={"status": 200, "request_id": "r"})))
    assert (entry["message"], entry["status"], entry["request_id"]) == ("GET /", 200, "r")
    assert (entry["level"], entry["logger"]) == ("info", "service.access")
    assert entry["time"].endswith("Z")


@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()])
def test_a_traceback_is_kept(formatter: logging.Formatter) -> None:
    try:
        raise ZeroDivisionError("here")
    except ZeroDivisionError:
        line = formatter.format(record("failed", exc_info=sys.exc_info()))
    assert "ZeroDivisionError: here" in line
