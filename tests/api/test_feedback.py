"""Rating answers over HTTP, on a real server."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api.harness import ADMIN_KEY, Served, error_of, serving
from tests.fixtures.tiny import TinyFamily

ADD = "Add 5 and 6."
ADMIN = {"X-API-Key": ADMIN_KEY}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("feedback")


@pytest.fixture(scope="module")
def learning(family: TinyFamily, folder: Path) -> Iterator[Served]:
    with serving(
        family.bundle,
        admin_key=ADMIN_KEY,
        feedback=True,
        feedback_dir=folder,
        feedback_snapshot_every=2,
        feedback_cap=8,
    ) as served:
        yield served


@pytest.fixture(autouse=True)
def _forgotten(learning: Served) -> None:
    for action in ("resume", "reset"):
        answer = learning.post("/admin/feedback", {"action": action}, headers=ADMIN)
        assert answer.status_code == 200, answer.text


def gates(served: Served) -> dict[str, float]:
    [told] = served.post("/v1/route", {"prompt": ADD}).json()["data"]
    return dict(told["gates"])


def test_bad_ratings_take_a_prompt_away_from_its_expert_and_a_rollback_gives_it_back(
    learning: Served,
) -> None:
    before = learning.metric('twinserve_feedback_total{result="applied"}')
    assert list(gates(learning)) == ["alpha"]
    rated = 0
    while "alpha" in gates(learning) and rated < 12:
        rated += 1
        done = learning.complete(prompt=ADD, max_tokens=1)
        answer = learning.post("/v1/feedback", {"request_id": done["id"], "reward": -1})
        assert answer.status_code == 200, answer.text
        told = answer.json()
        assert (told["applied"], told["explored"], told["choice"]) == (True, False, 0)
        assert told["experts"].keys() == (done["routing"]["gates"].keys() or {"shared"})
    assert "alpha" not in gates(learning)
    assert learning.metric('twinserve_feedback_total{result="applied"}') == before + rated
    state = learning.http.get("/admin/feedback", headers=ADMIN).json()
    assert state["enabled"]
    assert (state["version"], state["updates"]) == (told["version"], rated)
    assert state["experts"]["alpha"]["mean_reward"] == -1
    assert learning.post("/admin/feedback", {"action": "reset"}, headers=ADMIN).json()["experts"] == {}
    assert list(gates(learning)) == ["alpha"]


def test_a_rollback_brings_an_earlier_version_back_under_a_new_number(learning: Served, folder: Path) -> None:
    versions = []
    for _ in range(2):
        done = learning.complete(prompt=ADD, max_tokens=1)
        versions.append(
            learning.post("/v1/feedback", {"request_id": done["id"], "reward": -1}).json()["version"]
        )
    kept = learning.http.get("/admin/feedback", headers=ADMIN).json()
    assert versions[-1] in kept["versions"]
    assert (folder / f"feedback-{versions[-1]:012d}.safetensors").exists()
    learning.post("/admin/feedback", {"action": "reset"}, headers=ADMIN)
    back = learning.post("/admin/feedback", {"action": "rollback", "version": versions[-1]}, headers=ADMIN)
    assert back.json()["experts"] == kept["experts"]
    assert back.json()["version"] > versions[-1]
    unknown = learning.post("/admin/feedback", {"action": "rollback", "version": 10**9}, headers=ADMIN)
    assert (unknown.status_code, error_of(unknown)["param"]) == (400, "version")


def test_each_choice_of_a_streamed_answer_is_rated_by_its_index(learning: Served) -> None:
    body = {"model": "tiny", "prompt": ADD, "n": 2, "max_tokens": 1}
    chunks = learning.chunks("/v1/completions", body)
    for choice in (0, 1):
        answer = learning.post(
            "/v1/feedback", {"request_id": chunks[0]["id"], "reward": 0.5, "choice": choice}
        )
        assert answer.status_code == 200, answer.text
    answer = learning.post("/v1/feedback", {"request_id": chunks[0]["id"], "reward": 0.5, "choice": 2})
    assert error_of(answer)["code"] == "request_not_found"


def test_a_second_rating_an_unknown_answer_and_one_that_was_not_routed_are_refused(learning: Served) -> None:
    done = learning.complete(prompt=ADD, max_tokens=1)
    body = {"request_id": done["id"], "reward": 1}
    assert learning.post("/v1/feedback", body).status_code == 200
    again = learning.post("/v1/feedback", body)
    assert (again.status_code, error_of(again)["code"]) == (409, "already_rated")
    named = learning.complete(model="alpha", max_tokens=1)
    for request_id in ("cmpl-none", named["id"]):
        answer = learning.post("/v1/feedback", {"request_id": request_id, "reward": 1})
        assert (answer.status_code, error_of(answer)["code"]) == (404, "request_not_found")


def test_a_frozen_loop_answers_but_learns_nothing(learning: Served) -> None:
    done = learning.complete(prompt=ADD, max_tokens=1)
    state = learning.post("/admin/feedback", {"action": "freeze"}, headers=ADMIN).json()
    assert state["frozen"]
    answer = learning.post("/v1/feedback", {"request_id": done["id"], "reward": -1}).json()
    assert (answer["applied"], answer["experts"], answer["version"]) == (False, {}, state["version"])


@pytest.mark.parametrize("body", [{"action": "rollback"}, {"action": "reset", "version": 1}, {"action": "x"}])
def test_an_action_that_makes_no_sense_is_refused(learning: Served, body: dict[str, object]) -> None:
    assert learning.post("/admin/feedback", body, headers=ADMIN).status_code == 400


def test_a_key_rates_its_own_answers_alone(family: TinyFamily) -> None:
    with serving(family.bundle, api_keys="one,two", feedback=True) as served:
        mine, yours = ({"X-API-Key": key} for key in ("one", "two"))
        body = {"model": "tiny", "prompt": ADD, "max_tokens": 1}
        done = served.post("/v1/completions", body, headers=mine).json()
        rating = {"request_id": done["id"], "reward": 1}
        assert served.post("/v1/feedback", rating).status_code == 401
        assert served.post("/v1/feedback", rating, headers=yours).status_code == 404
        assert served.post("/v1/feedback", rating, headers=mine).status_code == 200


def test_explored_answers_are_marked_and_counted(family: TinyFamily) -> None:
    with serving(family.bundle, feedback=True, feedback_epsilon=0.5) as served:
        routings = [served.complete(prompt=ADD, max_tokens=1)["routing"] for _ in range(60)]
        explored = [routing for routing in routings if routing["explored"]]
        assert served.metric("twinserve_router_explored_total") == len(explored)
        assert 0 < len(explored) < 60
        assert all("alpha" not in routing["gates"] for routing in explored)


def test_without_the_setting_feedback_is_off_and_routing_as_ever(server: Served) -> None:
    done = server.complete(prompt=ADD, max_tokens=1)
    answer = server.post("/v1/feedback", {"request_id": done["id"], "reward": 1})
    assert (answer.status_code, error_of(answer)["code"]) == (403, "feedback_disabled")
    assert server.http.get("/admin/feedback", headers=ADMIN).json()["enabled"] is False


def test_routing_with_feedback_that_nobody_gave_is_the_static_one(learning: Served, server: Served) -> None:
    for prompt in (ADD, "SORT: river zebra river apple", "hello"):
        body = {"prompt": prompt}
        assert (
            learning.post("/v1/route", body).json()["data"] == server.post("/v1/route", body).json()["data"]
        )
