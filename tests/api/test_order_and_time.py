"""Priorities, timeouts, choices that share a prompt, and prompts that begin alike."""

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.api.harness import Served, error_of, eventually, serving
from tests.fixtures.tiny import TinyFamily

LONG: dict[str, Any] = {"model": "tiny", "prompt": "a", "max_tokens": 200, "ignore_eos": True}
PREFIX = "name the opposite of the word and add up the numbers one two three " * 3
ENDED = 'twinserve_request_success_total{finished_reason="%s"}'
HITS, QUERIES = "twinserve_prefix_cache_hits_total", "twinserve_prefix_cache_queries_total"


@pytest.fixture(scope="module")
def narrow(family: TinyFamily) -> Iterator[Served]:
    """One sequence at a time."""
    with serving(family.bundle, max_batch=1, max_wait_seconds=60) as served:
        yield served


def idle(server: Served) -> bool:
    gauges = server.runtime.gauges()
    leases = sum(status.leases for status in server.runtime.experts())
    return gauges.running == gauges.waiting == gauges.kv_blocks_used == leases == 0


def test_a_lower_priority_number_goes_first(narrow: Served) -> None:
    ended: list[int] = []

    async def one(client: httpx.AsyncClient, priority: int) -> None:
        answer = await client.post("/v1/completions", json={**LONG, "priority": priority})
        assert answer.status_code == 200
        ended.append(priority)

    async def all_at_once() -> None:
        async with httpx.AsyncClient(base_url=narrow.url, timeout=60) as client:
            running = asyncio.create_task(one(client, 0))
            while not narrow.runtime.gauges().running:
                await asyncio.sleep(0.005)
            waiting = [asyncio.create_task(one(client, priority)) for priority in (5, 7, -5)]
            await asyncio.gather(running, *waiting)

    asyncio.run(all_at_once())
    assert ended == [0, -5, 5, 7]


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_outlives_its_timeout_is_504_and_leaves_nothing_behind(
    server: Served, stream: bool
) -> None:
    body = {**LONG, "n": 4, "timeout": 1e-6, "stream": stream}
    before = {reason: server.metric(ENDED % reason) for reason in ("timeout", "error")}
    answer = server.post("/v1/completions", body)
    assert answer.status_code == 504
    error = error_of(answer)
    assert (error["code"], error["type"], error["param"]) == ("deadline_exceeded", "server_error", "timeout")
    assert eventually(lambda: idle(server))
    assert server.metric(ENDED % "timeout") > before["timeout"]
    assert server.metric(ENDED % "error") == before["error"]


def test_a_timeout_counts_the_wait_and_the_others_go_on(narrow: Served) -> None:
    async def both() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=narrow.url, timeout=60) as client:
            asked = [
                client.post("/v1/completions", json=LONG),
                client.post("/v1/completions", json={**LONG, "timeout": 0.05}),
            ]
            return list(await asyncio.gather(*asked))

    patient, hasty = asyncio.run(both())
    assert patient.status_code == 200
    assert hasty.status_code == 504
    assert eventually(lambda: idle(narrow))


def test_a_timeout_that_is_long_enough_changes_nothing(server: Served) -> None:
    assert (
        server.complete(max_tokens=4, seed=1, timeout=60)["choices"]
        == (server.complete(max_tokens=4, seed=1)["choices"])
    )


def test_an_openai_client_is_told_of_a_timeout(client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        client.completions.create(model="tiny", prompt="a", extra_body={"timeout": 1e-6})
    assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")


def test_a_prompt_that_begins_like_an_earlier_one_is_partly_known(server: Served) -> None:
    first = server.complete(model="beta", prompt=PREFIX + "x", max_tokens=8, temperature=0)
    hits, queries = server.metric(HITS), server.metric(QUERIES)
    again = server.complete(model="beta", prompt=PREFIX + "x", max_tokens=8, temperature=0)
    other = server.complete(model="beta", prompt=PREFIX + "y", max_tokens=8, temperature=0)
    expert = server.complete(model="gamma", prompt=PREFIX + "x", max_tokens=8, temperature=0)
    assert again["choices"] == first["choices"]
    cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in (again, other, expert)]
    assert cached[0] >= 16
    assert cached[1] >= 16
    assert cached[2] == 0
    assert server.metric(HITS) - hits == sum(cached)
    assert server.metric(QUERIES) - queries >= sum(cached)


def test_choices_of_one_prompt_compute_it_once(server: Served) -> None:
    prompt = "the quick brown fox jumps over the lazy dog and then some " * 3
    before = server.metric("twinserve_prompt_tokens_total")
    answer = server.complete(prompt=prompt, n=8, max_tokens=4, seed=2, ignore_eos=True)
    computed = server.metric("twinserve_prompt_tokens_total") - before
    tokens = answer["usage"]["prompt_tokens"]
    assert tokens <= computed < tokens + 8 * 17
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert len({choice["text"] for choice in answer["choices"]}) == 8
    assert len({str(choice["routing"]) for choice in answer["choices"]}) == 1


def test_without_a_prefix_cache_nothing_is_known_and_answers_are_the_same(
    server: Served, family: TinyFamily
) -> None:
    body: dict[str, Any] = {"prompt": PREFIX, "n": 2, "max_tokens": 8, "seed": 4}
    with serving(family.bundle, prefix_cache=False) as forgetful:
        answers = [forgetful.complete(**body) for _ in range(2)]
        assert forgetful.metric(HITS) == 0
    assert [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers] == [0, 0]
    assert answers[0]["choices"] == answers[1]["choices"] == server.complete(**body)["choices"]


def test_a_cache_that_is_too_small_for_all_costs_time_but_no_answer(
    server: Served, family: TinyFamily
) -> None:
    bodies: list[dict[str, Any]] = [
        {"prompt": f"{index} {PREFIX}", "max_tokens": 100, "temperature": 0, "ignore_eos": True}
        for index in range(4)
    ]
    expected = [server.complete(**body)["choices"] for body in bodies]

    async def together(url: str) -> list[Any]:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            asked = (client.post("/v1/completions", json={"model": "tiny", **body}) for body in bodies)
            return [answer.json()["choices"] for answer in await asyncio.gather(*asked)]

    # One sequence of the longest kind fits in any case; two of these do not.
    with serving(family.bundle, kv_cache_bytes=1) as small:
        assert asyncio.run(together(small.url)) == expected
        assert small.metric("twinserve_num_preemptions_total") > 0
        assert eventually(lambda: idle(small))


def test_routing_in_the_prompts_own_pass_gives_the_gates_of_routing_ahead(
    server: Served, family: TinyFamily
) -> None:
    bodies: list[dict[str, Any]] = [
        {"prompt": prompt, "n": 2, "max_tokens": 4, "seed": 1}
        for prompt in ("Add 1 and 2.", "SORT: river zebra river apple")
    ]
    with serving(family.bundle, single_pass=True) as single:
        for body in bodies:
            found, known = (served.complete(**body)["routing"] for served in (single, server))
            assert (found["gates"], found["generations"]) == (known["gates"], known["generations"])
            assert found["confidence"] == pytest.approx(known["confidence"], abs=1e-3)
        assert eventually(lambda: idle(single))


def test_a_server_as_it_comes_answers(family: TinyFamily, server: Served) -> None:
    body: dict[str, Any] = {"model": "beta", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    with serving(family.bundle, mix_mode="auto") as usual:
        texts = {usual.complete(**body)["choices"][0]["text"] for _ in range(8)}
    assert texts == {server.complete(**body)["choices"][0]["text"]}
