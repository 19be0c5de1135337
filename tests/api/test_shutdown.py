"""The command itself: what it prints, how it refuses to start, how it ends."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.harness import error_of, eventually, serving
from tests.fixtures.tiny import TinyFamily

ROOT = Path(__file__).parents[2]
LONG: dict[str, Any] = {"model": "tiny", "prompt": "a", "n": 16, "max_tokens": 240, "ignore_eos": True}


def command(*arguments: str, **variables: str) -> "subprocess.Popen[str]":
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TWINSERVE_")}
    return subprocess.Popen(
        [sys.executable, "-m", "service", *arguments],
        cwd=ROOT,
        env={**environment, **variables, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def running(family: TinyFamily) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """The served command, and the URL that it printed."""
    process = command(
        "serve", "--bundle", str(family.bundle), "--port", "0", "--dtype", "float32", "--log-json"
    )
    assert process.stdout is not None
    printed = ""
    try:
        for line in process.stdout:
            printed += line
            if "-d '" in line:
                break
        found = re.search(r"ready at (http://127\.0\.0\.1:\d+)", printed)
        assert found, printed
        assert f"curl {found[1]}/v1/chat/completions" in printed
        yield process, found[1]
    finally:
        process.kill()
        process.communicate()


def test_sigterm_lets_running_requests_end_and_refuses_new_ones(
    running: tuple["subprocess.Popen[str]", str],
) -> None:
    process, url = running
    with httpx.Client(base_url=url, timeout=60) as client:
        with client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            assert eventually(lambda: httpx.get(f"{url}/health/ready").status_code == 503)
            assert httpx.get(f"{url}/health/live").status_code == 200
            for refused in (
                httpx.post(f"{url}/v1/completions", json={"model": "tiny", "prompt": "a"}),
                httpx.get(f"{url}/v1/models"),
            ):
                assert refused.status_code == 503
                assert error_of(refused)["code"] == "shutting_down"
                assert int(refused.headers["retry-after"]) >= 1
                assert refused.headers["connection"] == "close"
            received = list(lines)
        assert "data: [DONE]" in received
        ends = [line for line in received if '"finish_reason":"length"' in line]
        assert len(ends) == 16
    _, log = process.communicate(timeout=30)
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{url}/health", timeout=5)
    assert process.returncode == 0
    entries = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    assert any("draining" in entry["message"] for entry in entries)
    access = next(
        entry for entry in entries if entry["logger"] == "service.access" and entry["status"] == 200
    )
    assert access["request_id"]
    assert access["completion_tokens"] == 16 * 240
    assert "Traceback" not in log


def test_a_drain_that_takes_too_long_ends_requests_with_an_error(family: TinyFamily) -> None:
    process = command(
        "serve",
        "--bundle",
        str(family.bundle),
        "--port",
        "0",
        "--dtype",
        "float32",
        TWINSERVE_DRAIN_SECONDS="0",
    )
    stack = contextlib.ExitStack()
    assert process.stdout is not None
    try:
        url = next(
            found[1] for line in process.stdout if (found := re.search(r"ready at (http://[\d.:]+)", line))
        )
        drained = threading.Thread(target=process.stdout.read)
        drained.start()
        plain: list[httpx.Response] = []
        asking = threading.Thread(
            target=lambda: plain.append(httpx.post(f"{url}/v1/completions", json=LONG, timeout=60))
        )
        idle = stack.enter_context(
            socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=60)
        )
        idle.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n")
        answered = b""
        while not answered.endswith(b"}"):
            answered += idle.recv(4096)
        assert b"200 OK" in answered
        with httpx.stream(
            "POST", f"{url}/v1/completions", json={**LONG, "stream": True}, timeout=60
        ) as answer:
            lines = answer.iter_lines()
            next(lines)
            asking.start()
            scraped = f"{url}/metrics"
            assert eventually(
                lambda: (
                    "twinserve_num_requests_waiting 0.0" not in httpx.get(scraped).text
                    or "twinserve_num_requests_running 32.0" in httpx.get(scraped).text
                )
            )
            process.send_signal(signal.SIGTERM)
            received = [line for line in lines if line]
        assert json.loads(received[-1].removeprefix("data: "))["error"]["code"] == "shutting_down"
        asking.join()
        assert plain[0].status_code == 503
        assert error_of(plain[0])["code"] == "shutting_down"
        assert plain[0].headers["retry-after"]
        assert idle.recv(1) == b"", "an idle connection was not closed"
        assert process.wait(30) == 0
        drained.join()
    finally:
        stack.close()
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("arguments", "variables", "said"),
    [
        (["--bundle", "/nonexistent"], {}, "/nonexistent is not a bundle"),
        (["--port", "70000"], {}, "TWINSERVE_PORT"),
        (["--dtype", "float8"], {}, "TWINSERVE_DTYPE"),
        ([], {"TWINSERVE_MAX_TOKENS": "many"}, "TWINSERVE_MAX_TOKENS"),
        ([], {"TWINSERVE_PREFILL_STEP": "8"}, "TWINSERVE_PREFILL_STEP: Input should be greater than"),
        ([], {"TWINSERVE_MIX_MODE": "merged", "TWINSERVE_NATIVE": "off"}, "TWINSERVE_NATIVE is off"),
        ([], {"TWINSERVE_API_KEYS_FILE": "/nonexistent"}, "TWINSERVE_API_KEYS_FILE"),
        ([], {"TWINSERVE_ADMIN_KEY": "same", "TWINSERVE_API_KEYS": "a,same"}, "must differ"),
    ],
)
def test_a_server_that_cannot_start_says_why_in_one_line(
    arguments: list[str], variables: dict[str, str], said: str
) -> None:
    process = command("serve", *arguments, **variables)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode in (1, 2)
    assert said in complaint
    assert "Traceback" not in complaint


def test_an_ended_engine_ends_streams_with_an_error_and_refuses_with_503(family: TinyFamily) -> None:
    with serving(family.bundle) as served:
        with served.http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            served.runtime.close()
            received = [line for line in lines if line]
        assert json.loads(received[-1].removeprefix("data: "))["error"]["code"] == "shutting_down"
        refused = served.post("/v1/completions", {"model": "tiny", "prompt": "a"})
        assert refused.status_code == 503
        assert error_of(refused)["code"] == "engine_dead"
        for path in ("/health", "/health/live", "/health/ready"):
            assert served.http.get(path).status_code == 503
        assert served.metric("twinserve_engine_up") == 0
