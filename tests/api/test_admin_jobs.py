"""A registration as a job: looked at, followed, cancelled, tried again, sent twice."""

import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.harness import ADMIN_KEY, Served, error_of, eventually, serving
from tests.api.operators import ADMIN, PROMPTS, Operator, worker_pids, workers_held
from tests.fixtures.tiny import TinyFamily, tiny_family, tiny_lora

SECOND_KEY = "another-admin-key"


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> TinyFamily:
    """A family whose experts these tests change."""
    return tiny_family(tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="module")
def root(own: TinyFamily, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    tiny_lora(folder / "one", own.base, rank=4, seed=81)
    tiny_lora(folder / "two", own.base, rank=2, seed=82)
    shutil.copytree(folder / "one", folder / "broken")
    weights = folder / "broken" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return folder


@pytest.fixture(scope="module")
def served(own: TinyFamily, root: Path, others: frozenset[int]) -> Iterator[Served]:
    options: dict[str, Any] = {"max_registrations": 4, "keepalive_seconds": 0.2}
    with serving(
        own.bundle, admin_key=f"{ADMIN_KEY},second = {SECOND_KEY}", experts_root=root, **options
    ) as server:
        yield server


@pytest.fixture(scope="module")
def others() -> frozenset[int]:
    """Workers of servers that were there before."""
    return frozenset(worker_pids())


@pytest.fixture
def admin(others: frozenset[int], served: Served) -> Operator:
    return Operator(served, others=others)


@pytest.fixture
def second(served: Served) -> Operator:
    return Operator(served, {"Authorization": f"Bearer {SECOND_KEY}"})


def test_a_registration_is_a_job_that_says_how_far_it_is_and_what_came_of_it(admin: Operator) -> None:
    begun = admin.begin(name="job-one", path="one", prompts=PROMPTS)
    assert begun.status_code == 202, begun.text
    job = begun.json()
    assert begun.headers["location"] == f"/admin/jobs/{job['id']}"
    assert int(begun.headers["retry-after"]) >= 1
    assert (job["object"], job["kind"], job["name"], job["generation"]) == ("job", "register", "job-one", 1)
    assert job["state"] in ("queued", "running")
    assert job["result"] is job["error"] is job["ended_at"] is None

    ended = admin.ended(job["id"])
    assert (ended["state"], ended["percent"], ended["error"]) == ("succeeded", 100, None)
    assert ended["created_at"] <= ended["started_at"] <= ended["ended_at"]
    assert ended["attempt"] == 1
    expert = admin.ask("GET", "/experts/job-one")
    assert expert.headers["etag"] == '"1"'
    assert expert.json()["routed"] is True
    [generation] = expert.json()["generations"]
    assert (generation["state"], generation["serving"], generation["job"]) == ("ready", True, job["id"])
    assert generation["profiled"] is True
    assert admin.text(model="job-one")[1] == {"job-one": 1}


def test_a_job_that_ends_in_time_is_answered_as_if_it_had_been_at_once(admin: Operator) -> None:
    made = admin.register(name="at-once", path="one", rank=4)
    assert made.status_code == 201, made.text
    assert made.headers["location"] == "/admin/experts/at-once"
    assert made.headers["etag"] == '"1"'
    body = made.json()
    assert (body["generation"], body["new_generation"], body["state"], body["loaded"]) == (
        1,
        1,
        "active",
        True,
    )
    assert body["report"]
    assert admin.job(body["job"])["state"] == "succeeded"


def test_whoever_waits_less_gets_the_job_and_may_hang_up(admin: Operator) -> None:
    with workers_held(admin.others):
        late = admin.post("/experts", {"name": "late", "path": "one"}, params={"wait": 0.2})
        assert late.status_code == 202, late.text
        assert late.json()["ended_at"] is None
    assert admin.ended(late.json()["id"])["state"] == "succeeded"


def test_a_failed_job_says_why_and_leaves_nothing_that_serves(admin: Operator) -> None:
    begun = admin.begin(name="faulty", path="broken")
    assert begun.status_code == 202, begun.text
    job = admin.ended(begun.json()["id"])
    assert job["state"] == "failed"
    assert job["error"]["code"] == "expert_rejected"
    assert "adapter_model.safetensors" in job["error"]["message"]
    assert job["error"]["param"] == "path"
    waited = admin.register(name="faulty", path="broken")
    assert waited.status_code == 422
    assert error_of(waited) == {**job["error"], "type": "invalid_request_error"}
    assert admin.ask("GET", "/experts/faulty").status_code == 404
    assert "faulty" not in {one["name"] for one in admin.get("/experts")["data"]}
    generations = admin.get("/experts/faulty/generations")["data"]
    assert [(one["generation"], one["state"], one["serving"]) for one in generations] == [
        (2, "failed", False),
        (1, "failed", False),
    ]
    assert admin.served.post("/v1/completions", {"model": "faulty", "prompt": "a"}).status_code == 404


def test_a_job_is_followed_from_where_it_is_to_its_end(admin: Operator) -> None:
    with workers_held(admin.others):
        job = admin.begin(name="followed", path="one", prompts=PROMPTS).json()["id"]
        seen: list[list[Any]] = []
        follower = threading.Thread(target=lambda: seen.append(admin.events(job)))
        follower.start()
        silent = admin.served.http.stream("GET", f"/admin/jobs/{job}/events", headers=admin.headers)
        with silent as answer:
            lines = answer.iter_lines()
            assert next(lines) == "event: progress"
            assert next(line for line in lines if line.startswith(":")) == ": keep-alive"
    follower.join(60)
    [events] = seen
    assert [name for name, _, _ in events[:-1]] == ["progress"] * (len(events) - 1)
    assert events[-1][0] == "end"
    assert events[-1][2] == admin.job(job)
    percents = [data["percent"] for _, _, data in events]
    assert percents == sorted(percents)
    assert percents[-1] == 100
    assert {data["id"] for _, _, data in events} == {job}
    assert len({identity for _, identity, _ in events}) == len(events)
    stages = {data["stage"] for _, _, data in events}
    assert len(stages) > 1


def test_whoever_comes_back_is_told_what_is_new_and_the_end_always(admin: Operator) -> None:
    job = str(admin.registered(name="again", path="one")["job"])
    [(name, identity, data)] = admin.events(job)
    assert (name, data["state"]) == ("end", "succeeded")
    assert admin.events(job, **{"Last-Event-ID": identity}) == [(name, identity, data)]
    with workers_held(admin.others):
        running = admin.begin(name="again", path="two", expected_generation=1).json()["id"]
        assert eventually(lambda: admin.job(running)["state"] == "running")
        known = first_id(admin, running)
        seen: list[list[Any]] = []
        headers = {"Last-Event-ID": known}
        follower = threading.Thread(target=lambda: seen.append(admin.events(running, **headers)))
        follower.start()
    follower.join(60)
    [events] = seen
    assert known not in {identity for _, identity, _ in events}
    assert events[-1][0] == "end"


def first_id(admin: Operator, job: str) -> str:
    """The id of the first event of a stream that is then left."""
    stream = admin.served.http.stream("GET", f"/admin/jobs/{job}/events", headers=admin.headers)
    with stream as answer:
        return next(line.removeprefix("id: ") for line in answer.iter_lines() if line.startswith("id: "))


def test_a_waiting_job_is_cancelled_at_once_and_can_be_tried_again(admin: Operator) -> None:
    with workers_held(admin.others):
        running = admin.begin(name="cancel-one", path="one").json()["id"]
        assert eventually(lambda: admin.job(running)["state"] == "running")
        waiting = admin.begin(name="cancel-two", path="two").json()["id"]
        cancelled = admin.post(f"/jobs/{waiting}/cancel")
        assert cancelled.status_code == 200
        assert cancelled.json()["state"] == "cancelled"
        again = admin.post(f"/jobs/{waiting}/cancel")
        assert again.status_code == 409
        assert error_of(again)["code"] == "wrong_state"
    assert admin.ended(running)["state"] == "succeeded"
    assert admin.ask("GET", "/experts/cancel-two").status_code == 404
    retried = admin.post(f"/jobs/{waiting}/retry")
    assert retried.status_code == 202, retried.text
    job = retried.json()
    assert job["id"] != waiting
    assert job["generation"] == 2
    assert retried.headers["location"] == f"/admin/jobs/{job['id']}"
    assert admin.ended(job["id"])["state"] == "succeeded"
    assert admin.text(model="cancel-two")[1] == {"cancel-two": 2}


def test_a_running_job_is_cancelled_and_leaves_nothing(admin: Operator) -> None:
    with workers_held(admin.others):
        job = admin.begin(name="cancel-running", path="one").json()["id"]
        assert eventually(lambda: admin.job(job)["state"] == "running")
        assert admin.post(f"/jobs/{job}/cancel").status_code == 200
        ended = admin.ended(job)
    assert ended["state"] == "cancelled"
    assert [name for name, _, _ in admin.events(job)] == ["end"]
    assert admin.ask("GET", "/experts/cancel-running").status_code == 404
    waited = admin.registered(name="cancel-running", path="one")
    assert waited["generation"] == 2


def test_a_job_whose_worker_is_killed_is_begun_anew_and_succeeds(admin: Operator) -> None:
    with workers_held(admin.others):
        job = admin.begin(name="killed", path="one").json()["id"]
        assert eventually(lambda: admin.job(job)["state"] == "running")
        for pid in set(worker_pids()) - admin.others:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    ended = admin.ended(job)
    assert (ended["state"], ended["error"]) == ("succeeded", None)
    assert admin.text(model="killed")[1] == {"killed": 1}


@pytest.mark.parametrize("action", ["cancel", "retry"])
def test_what_has_succeeded_is_neither_cancelled_nor_tried_again(admin: Operator, action: str) -> None:
    job = admin.registered(name=f"done-{action}", path="one")["job"]
    answer = admin.post(f"/jobs/{job}/{action}")
    assert answer.status_code == 409
    assert error_of(answer)["code"] == "wrong_state"


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", ""), ("GET", "/events"), ("POST", "/cancel"), ("POST", "/retry")],
)
@pytest.mark.parametrize("job", ["job-nobody", "x" * 300, "%F0%9F%90%8D", "..", "job%20x"])
def test_a_job_that_is_not_there_is_404(admin: Operator, method: str, path: str, job: str) -> None:
    answer = admin.ask(method, f"/jobs/{job}{path}")
    assert answer.status_code in (404, 405)
    if answer.status_code == 404:
        assert error_of(answer)["code"] in ("record_not_found", "not_found")


def test_the_same_request_under_one_idempotency_key_is_one_job(admin: Operator, second: Operator) -> None:
    headers = {"Idempotency-Key": "deploy-17"}
    body: dict[str, Any] = {"name": "once", "path": "one"}
    first = admin.begin(headers, **body)
    replay = admin.begin(headers, **body)
    assert first.status_code == replay.status_code == 202
    assert first.json()["id"] == replay.json()["id"]
    assert admin.ended(first.json()["id"])["state"] == "succeeded"
    late = admin.register(headers, **body)
    assert late.status_code == 201, late.text
    assert late.json()["job"] == first.json()["id"]
    assert late.json()["generation"] == 1

    other = admin.begin(headers, **{**body, "path": "two"})
    assert other.status_code == 422
    assert error_of(other)["code"] == "idempotency_key_reused"
    assert error_of(other)["param"] == "Idempotency-Key"
    # Another operator's key of the same text is another key.
    foreign = second.begin(headers, name="once-more", path="two")
    assert foreign.status_code == 202, foreign.text
    assert admin.ended(foreign.json()["id"])["state"] == "succeeded"
    assert len(admin.get("/experts/once/generations")["data"]) == 1


def test_requests_under_one_key_that_race_make_one_job(admin: Operator) -> None:
    answers: list[Any] = []
    barrier = threading.Barrier(8)

    def send() -> None:
        barrier.wait()
        answers.append(admin.begin({"Idempotency-Key": "race"}, name="raced", path="one"))

    threads = [threading.Thread(target=send) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert admin.ended(answers[0].json()["id"])["state"] == "succeeded"


@pytest.mark.parametrize("key", ["", "a b", "x" * 201, "café"])
def test_a_strange_idempotency_key_is_refused(admin: Operator, key: str) -> None:
    answer = admin.begin({"Idempotency-Key": key.encode()}, name="never", path="one")
    assert answer.status_code == 400, answer.text
    assert error_of(answer)["param"] == "Idempotency-Key"


def test_a_name_that_is_being_registered_is_not_registered_twice(admin: Operator, second: Operator) -> None:
    with workers_held(admin.others):
        first = admin.begin(name="busy", path="one")
        assert first.status_code == 202
        for again in (
            second.begin(name="busy", path="two"),
            second.begin(name="busy", path="two", replace=True),
        ):
            assert again.status_code == 409
            assert error_of(again)["code"] == "wrong_state"
            assert first.json()["id"] in error_of(again)["message"]
    assert admin.ended(first.json()["id"])["state"] == "succeeded"


def test_jobs_beyond_the_limit_are_refused_at_once(admin: Operator) -> None:
    with workers_held(admin.others):
        begun = [admin.begin(name=f"many-{index}", path="one") for index in range(5)]
        assert [answer.status_code for answer in begun] == [202] * 4 + [429]
        assert error_of(begun[4])["code"] == "queue_full"
        assert "TWINSERVE_MAX_REGISTRATIONS" in error_of(begun[4])["message"]
        assert int(begun[4].headers["retry-after"]) >= 1
        assert admin.ask("DELETE", "/experts/job-one").status_code in (200, 404)
        for answer in begun[:4]:
            assert admin.post(f"/jobs/{answer.json()['id']}/cancel").status_code == 200
    for answer in begun[:4]:
        assert admin.ended(answer.json()["id"])["state"] in ("cancelled", "succeeded")


def test_jobs_are_listed_newest_first_a_page_at_a_time(admin: Operator) -> None:
    for index in range(3):
        admin.registered(name="paged", path=("one", "two")[index % 2], replace=True)
    every = admin.get("/jobs", limit=1000)["data"]
    found: list[dict[str, Any]] = []
    query: dict[str, Any] = {"limit": 2}
    while True:
        page = admin.get("/jobs", **query)
        assert len(page["data"]) <= 2
        found += page["data"]
        if not page["has_more"]:
            break
        query["after"] = page["data"][-1]["id"]
    assert found == every
    times = [job["created_at"] for job in every]
    assert times == sorted(times, reverse=True)
    mine = admin.get("/jobs", name="paged", state="succeeded")["data"]
    assert [job["generation"] for job in mine] == [3, 2, 1]
    assert admin.get("/jobs", name="paged", state="failed")["data"] == []


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"limit": 0}, "limit"),
        ({"limit": 1001}, "limit"),
        ({"limit": "x"}, "limit"),
        ({"state": "done"}, "state"),
        ({"after": ""}, "after"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_bad_query_is_refused_by_field(admin: Operator, query: dict[str, Any], param: str) -> None:
    answer = admin.ask("GET", "/jobs", params=query)
    assert answer.status_code == 400, answer.text
    assert error_of(answer)["param"] == param


@pytest.mark.parametrize("wait", ["-1", "601", "nan", "inf", "soon", ""])
def test_a_bad_wait_is_refused_and_begins_nothing(admin: Operator, wait: str) -> None:
    answer = admin.post("/experts", {"name": "waits", "path": "one"}, params={"wait": wait})
    assert answer.status_code == 400, answer.text
    assert error_of(answer)["param"] == "wait"
    assert admin.get("/jobs", name="waits")["data"] == []


def test_the_log_tells_who_did_what_from_where_with_what_result(admin: Operator, second: Operator) -> None:
    second.registered(name="logged", path="one")
    assert second.begin(name="logged", path="one").status_code == 409
    assert second.ask("DELETE", "/experts/logged").status_code == 200
    entries = admin.get("/audit", target="logged")["data"]
    assert {entry["actor"] for entry in entries} <= {"second", "system"}
    asked = [entry for entry in entries if entry["actor"] == "second"]
    assert {entry["address"] for entry in asked} == {"127.0.0.1"}
    assert any("refused" in entry["result"] for entry in asked)
    assert all(abs(entry["at"] - time.time()) < 600 for entry in entries)
    ids = [entry["id"] for entry in entries]
    assert ids == sorted(ids, reverse=True)
    [older, *_] = admin.get("/audit", limit=1, before=ids[0])["data"]
    assert older["id"] < ids[0]
    assert ADMIN_KEY not in admin.ask("GET", "/audit", params={"limit": 1000}).text
    assert SECOND_KEY not in admin.ask("GET", "/audit", params={"limit": 1000}).text


def test_a_server_that_shuts_down_lets_those_go_who_follow_or_wait(own: TinyFamily, tmp_path: Path) -> None:
    tiny_lora(tmp_path / "root" / "one", own.base, rank=4, seed=81)
    bundle = Path(shutil.copytree(own.bundle, tmp_path / "bundle"))
    others = frozenset(worker_pids())
    told: list[str] = []
    following, waited = threading.Event(), threading.Event()

    def follow(url: str, job: str) -> None:
        client = httpx.Client(base_url=url, headers=ADMIN, timeout=60)
        with client as http, http.stream("GET", f"/admin/jobs/{job}/events") as answer:
            for line in answer.iter_lines():
                told.append(line)
                following.set()

    def wait(url: str) -> None:
        with httpx.Client(base_url=url, headers=ADMIN, timeout=60) as http:
            body = {"name": "parting", "path": "one"}
            answer = http.post("/admin/experts", json=body, params={"wait": 60})
            assert answer.status_code == 202, answer.text
            waited.set()

    with contextlib.ExitStack() as stack:
        options: dict[str, Any] = {"admin_key": ADMIN_KEY, "experts_root": tmp_path / "root"}
        served = stack.enter_context(serving(bundle, **options, drain_seconds=25))
        admin = Operator(served, others=others)
        with workers_held(others):
            threads = [threading.Thread(target=wait, args=(served.url,))]
            threads[0].start()
            assert eventually(lambda: bool(admin.get("/jobs", name="parting")["data"]))
            job = admin.get("/jobs", name="parting")["data"][0]["id"]
            threads.append(threading.Thread(target=follow, args=(served.url, job)))
            threads[1].start()
            assert following.wait(10)
            start = time.monotonic()
            stack.close()
            for thread in threads:
                thread.join(10)
            assert time.monotonic() - start < 15
    assert waited.is_set()
    assert "event: end" not in told
    # The job was not lost: whoever serves next goes on with it.
    with serving(bundle, **options) as served:
        assert Operator(served).ended(job)["state"] == "succeeded"
