"""What one caller may use, over real connections and a real engine."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.api.harness import ADMIN_KEY, Served, error_of, eventually, serving
from tests.api.test_edge_connections import connected, unread
from tests.fixtures.tiny import TinyFamily

BODY: dict[str, Any] = {"model": "alpha", "prompt": "Add 1 and 2.", "max_tokens": 4, "ignore_eos": True}
LONG: dict[str, Any] = {**BODY, "max_tokens": 200, "stream": True}


def key(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {name}"}


@pytest.fixture(scope="module")
def metered(family: TinyFamily) -> Iterator[Served]:
    keys = (
        "plain,few = few-key rpm=2,short = short-key tpm=20,one = one-key concurrency=1 rpm=1000,"
        "rich = rich-key rpm=1000 tpm=1000000 concurrency=100"
    )
    with serving(family.bundle, api_keys=keys, admin_key=ADMIN_KEY, requests_per_minute=5) as served:
        yield served


def test_every_answer_tells_what_is_left(metered: Served) -> None:
    first = metered.post("/v1/completions", BODY, headers=key("rich-key"))
    second = metered.post("/v1/completions", {**BODY, "max_tokens": -1}, headers=key("rich-key"))
    assert (first.status_code, second.status_code) == (200, 400)
    for answer, left in ((first, "999"), (second, "998")):
        assert answer.headers["x-ratelimit-limit-requests"] == "1000"
        assert answer.headers["x-ratelimit-remaining-requests"] == left
        assert answer.headers["x-ratelimit-limit-tokens"] == "1000000"
        assert float(answer.headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 60


def test_requests_beyond_the_minute_are_refused_with_a_time_and_others_go_on(metered: Served) -> None:
    for _ in range(2):
        assert metered.post("/v1/completions", BODY, headers=key("few-key")).status_code == 200
    refused = metered.post("/v1/completions", BODY, headers=key("few-key"))
    assert refused.status_code == 429
    assert error_of(refused)["code"] == "rate_limit_exceeded"
    assert "requests_per_minute" in error_of(refused)["message"]
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert metered.http.get("/v1/models", headers=key("few-key")).status_code == 200
    assert metered.post("/v1/completions", BODY, headers=key("rich-key")).status_code == 200


def test_the_servers_own_limit_holds_for_keys_that_say_nothing(metered: Served) -> None:
    found = [metered.post("/v1/completions", BODY, headers=key("plain")).status_code for _ in range(6)]
    assert found == [200] * 5 + [429]


def test_the_official_client_understands_the_refusal(metered: Served) -> None:
    def ask() -> None:
        for _ in range(3):
            client.completions.create(model="alpha", prompt="a", max_tokens=1)

    client = openai.OpenAI(base_url=f"{metered.url}/v1", api_key="few-key", max_retries=0)
    with client, pytest.raises(openai.RateLimitError) as refused:
        ask()
    assert refused.value.code == "rate_limit_exceeded"


def test_tokens_are_charged_when_they_are_made_and_then_refused(metered: Served) -> None:
    first = metered.post("/v1/completions", {**BODY, "n": 2, "max_tokens": 10}, headers=key("short-key"))
    assert first.status_code == 200
    used = first.json()["usage"]["total_tokens"]
    assert used > 20

    def refused() -> bool:
        answer = metered.post("/v1/completions", BODY, headers=key("short-key"))
        return answer.status_code == 429 and "tokens_per_minute" in error_of(answer)["message"]

    assert eventually(refused)
    answer = metered.post("/v1/completions", BODY, headers=key("short-key"))
    assert answer.headers["x-ratelimit-remaining-tokens"] == "0"
    assert 1 <= int(answer.headers["retry-after"]) <= 60


def test_the_charge_is_the_usage(metered: Served) -> None:
    def left() -> int:
        answer = metered.post("/v1/tokenize-nothing", {}, headers=key("rich-key"))
        return int(answer.headers["x-ratelimit-remaining-tokens"])

    before = left()
    body = {**BODY, "prompt": ["Add 1 and 2.", "SORT: b a"], "n": 3, "max_tokens": 7}
    answer = metered.post("/v1/completions", body, headers=key("rich-key"))
    assert eventually(lambda: left() == before - answer.json()["usage"]["total_tokens"])


def test_requests_at_once_are_bounded_and_given_back_however_they_end(metered: Served) -> None:
    def other() -> int:
        return metered.post("/v1/completions", BODY, headers=key("one-key")).status_code

    def begin(**change: Any) -> Any:
        return metered.http.stream("POST", "/v1/completions", json={**LONG, **change}, headers=key("one-key"))

    with connected(metered, receive_buffer=4096) as connection:
        unread(connection, b"Authorization: Bearer one-key\r\n", stream=True)
        assert connection.recv(1) == b"H"
        refused = metered.post("/v1/completions", BODY, headers=key("one-key"))
        assert refused.status_code == 429
        assert "max_concurrent" in error_of(refused)["message"]
        assert refused.headers["retry-after"] == "1"
    assert eventually(lambda: other() == 200), "a client that hung up"
    with begin(max_tokens=2) as answer:
        answer.read()
    assert eventually(lambda: other() == 200), "a stream that ended"
    with begin(max_tokens=100_000) as answer:
        assert answer.status_code == 400
        answer.read()
    assert eventually(lambda: other() == 200), "a refusal"
    with begin(timeout=0.001) as answer:
        answer.read()
    assert eventually(lambda: other() == 200), "a deadline"


def test_many_at_once_never_exceed_the_bound(family: TinyFamily) -> None:
    with serving(family.bundle, api_keys="a-key", max_concurrent=2) as served:

        def ask(_: int) -> int:
            body = {**BODY, "max_tokens": 60}
            return served.post("/v1/completions", body, headers=key("a-key")).status_code

        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(ask, range(24)))
        assert set(found) == {200, 429}
        assert eventually(lambda: ask(0) == 200)


def test_without_keys_an_address_is_a_caller(family: TinyFamily) -> None:
    with serving(family.bundle, requests_per_minute=3) as served:
        found = [served.post("/v1/completions", BODY).status_code for _ in range(4)]
        assert found == [200, 200, 200, 429]
        # uvicorn believes a proxy on this machine.
        elsewhere = {"X-Forwarded-For": "203.0.113.9"}
        assert served.post("/v1/completions", BODY, headers=elsewhere).status_code == 200
        for last in ("1", "2", "3"):
            same = {"X-Forwarded-For": f"2001:db8::{last}"}
            assert served.post("/v1/completions", BODY, headers=same).status_code == 200
        same = {"X-Forwarded-For": "2001:db8::4"}
        assert served.post("/v1/completions", BODY, headers=same).status_code == 429
        assert served.metric('twinserve_rate_limited_total{limit="requests"}') == 2


def test_the_admin_is_not_limited_and_probes_are_not(metered: Served) -> None:
    for _ in range(8):
        answer = metered.post("/admin/experts", {}, headers=key(ADMIN_KEY))
        assert answer.status_code == 400
        assert "x-ratelimit-limit-requests" not in answer.headers
        assert metered.http.get("/health").status_code == 200


def test_metrics_name_keys_by_their_labels(metered: Served) -> None:
    metered.post("/v1/completions", BODY, headers=key("rich-key"))
    scraped = metered.http.get("/metrics", headers=key(ADMIN_KEY)).text
    assert 'twinserve_key_requests_total{key="rich"}' in scraped
    assert 'twinserve_key_tokens_total{key="rich",kind="prompt"}' in scraped
    assert "rich-key" not in scraped
    assert json.dumps(BODY["prompt"]) not in scraped
