"""The feedback loop by itself: what it remembers, what a rating does, versions on disk."""

import asyncio
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experts.routing import BanditSpec, ContextMap, FeatureSpec
from experts.routing.gaussian import GaussianRouter
from service.core import ExpertKey, RoutingChoice, RoutingOutcome
from service.engine.routing import Dispatcher, RoutingDefaults
from service.errors import AlreadyRatedError, InvalidRequestError, RequestNotFoundError
from service.feedback import Feedback, FeedbackOptions, Snapshots
from service.scheduler.catalogue import Catalogue
from tests.unit.service.backend import ScriptedBackend
from tests.unit.service.edge import BODY, call

STATIC = {"a": 0.9, "b": 0.08, "c": 0.02}
SPEC = BanditSpec(dims=4)
MAP = ContextMap.make(np.zeros(6, np.float32), np.ones(6, np.float32), 4, 0)
PROMPT = torch.tensor([1.0, -1, 2, 0.5, 0, 3])


class Counts:
    def __init__(self) -> None:
        self.results: list[str] = []
        self.explored = 0

    def on_feedback(self, result: str, reward: float) -> None:
        self.results.append(result)

    def on_explored(self) -> None:
        self.explored += 1


def made(folder: Path | None = None, stats: Counts | None = None, **options: Any) -> Feedback:
    settings = FeedbackOptions(**{"spec": SPEC, "folder": folder, **options})
    return Feedback(settings, Snapshots(folder, 3), stats, names=STATIC, context=MAP, seed=0)


def answered(feedback: Feedback, request_id: str, gates: dict[str, float], client: str = "") -> None:
    decision = feedback.decide(PROMPT, STATIC, 0.05, explore=True)
    assert decision is not None
    told = RoutingOutcome(gates, "", "factored", {}, explored=decision.explored, decision=decision)
    feedback.routed(request_id, client, told)


def rate(feedback: Feedback, request_id: str, reward: float, client: str = "") -> Any:
    return asyncio.run(feedback.rate(request_id, reward, client))


def teach(feedback: Feedback, times: int, name: str = "a", reward: float = -1.0) -> None:
    for index in range(times):
        answered(feedback, f"{name}{reward}{index}", {name: 1.0})
        rate(feedback, f"{name}{reward}{index}", reward)


def row(feedback: Feedback) -> dict[str, float]:
    decision = feedback.decide(PROMPT, STATIC, 0.05, explore=False)
    assert decision is not None
    return dict(decision.adjusted)


def test_ratings_that_agree_change_the_next_prompt_of_the_kind_and_say_how() -> None:
    stats = Counts()
    feedback = made(stats=stats)
    assert row(feedback) == STATIC
    for index in range(6):
        answered(feedback, str(index), {"a": 0.75, "b": 0.25})
        applied = rate(feedback, str(index), -1.0)
    assert (applied.applied, applied.version) == (True, 6)
    assert {name: change.part for name, change in applied.experts.items()} == {"a": 0.75, "b": 0.25}
    assert applied.experts["a"].after < applied.experts["a"].before < 0
    assert row(feedback)["a"] < STATIC["a"]
    assert stats.results == ["applied"] * 6


def test_an_answer_is_rated_once_and_by_its_own_client() -> None:
    stats = Counts()
    feedback = made(stats=stats)
    answered(feedback, "one", {"a": 1.0}, client="me")
    for client in ("you", ""):
        with pytest.raises(RequestNotFoundError):
            rate(feedback, "one", 1.0, client)
    rate(feedback, "one", 1.0, "me")
    with pytest.raises(AlreadyRatedError):
        rate(feedback, "one", 1.0, "me")
    assert stats.results == ["unknown", "unknown", "applied", "repeated"]


def test_memory_is_bounded_in_number_and_age() -> None:
    feedback = made(remembered=2)
    for name in ("one", "two", "three"):
        answered(feedback, name, {"a": 1.0})
    with pytest.raises(RequestNotFoundError):
        rate(feedback, "one", 1.0)
    assert feedback.describe()["remembered"] == 2
    forgetful = made(seconds=1e-9)
    answered(forgetful, "one", {"a": 1.0})
    with pytest.raises(RequestNotFoundError, match="TWINSERVE_FEEDBACK_SECONDS"):
        rate(forgetful, "one", 1.0)


def test_an_answer_whose_gates_the_client_named_is_not_remembered() -> None:
    feedback = made()
    feedback.routed("one", "", RoutingOutcome({"a": 1.0}, "", "factored", {}))
    with pytest.raises(RequestNotFoundError):
        rate(feedback, "one", 1.0)


def test_frozen_feedback_keeps_its_adjustments_and_learns_nothing() -> None:
    feedback = made()
    teach(feedback, 3)
    learnt = row(feedback)
    feedback.frozen = True
    answered(feedback, "more", {"a": 1.0})
    assert not rate(feedback, "more", 1.0).applied
    assert row(feedback) == learnt
    feedback.frozen = False
    assert rate(feedback, "more", 1.0).applied


def test_frozen_feedback_does_not_explore() -> None:
    feedback = made(spec=BanditSpec(dims=4, epsilon=0.5))
    feedback.frozen = True
    decisions = [feedback.decide(PROMPT, STATIC, 0.05, explore=True) for _ in range(50)]
    assert not any(decision is None or decision.explored for decision in decisions)


def test_explored_answers_are_counted() -> None:
    stats = Counts()
    feedback = made(stats=stats, spec=BanditSpec(dims=4, epsilon=0.5))
    for index in range(200):
        answered(feedback, str(index), {"a": 1.0})
    assert 0 < stats.explored < 120


def test_reset_gives_the_static_router_and_rollback_what_was_known_then() -> None:
    feedback = made(snapshot_every=2)
    teach(feedback, 2)
    learnt = row(feedback)
    teach(feedback, 2, "b", 1.0)
    asyncio.run(feedback.reset())
    assert row(feedback) == STATIC
    asyncio.run(feedback.rollback(2))
    assert row(feedback) == learnt
    state = feedback.describe()
    assert (state["version"], state["updates"]) == (6, 2)
    assert state["versions"] == [4, 5, 6]
    with pytest.raises(InvalidRequestError, match="kept are: 4, 5, 6"):
        asyncio.run(feedback.rollback(2))


def test_a_restart_resumes_from_the_folder(tmp_path: Path) -> None:
    first = made(tmp_path)
    teach(first, 5)
    first.close()
    second = made(tmp_path)
    assert second.describe()["version"] == 5
    assert second.describe()["experts"]["a"]["mean_reward"] == -1
    for name, value in row(second).items():
        assert value == pytest.approx(row(first)[name], abs=1e-9)
    asyncio.run(second.reset())
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "feedback-000000000005.safetensors",
        "feedback-000000000006.safetensors",
    ]


@pytest.mark.parametrize("damage", ["cut", "empty", "other"])
def test_a_damaged_version_is_passed_over(tmp_path: Path, damage: str) -> None:
    feedback = made(tmp_path, snapshot_every=2)
    teach(feedback, 4)
    newest = tmp_path / "feedback-000000000004.safetensors"
    if damage == "other":
        os.replace(newest, tmp_path / "feedback-4.safetensors")
    else:
        newest.write_bytes(newest.read_bytes()[:100] if damage == "cut" else b"")
    assert made(tmp_path).describe()["version"] == 2


def test_versions_of_another_routers_features_are_left_alone(tmp_path: Path) -> None:
    first = made(tmp_path)
    teach(first, 3)
    first.close()
    wider = ContextMap.make(np.zeros(7, np.float32), np.ones(7, np.float32), 4, 0)
    options = FeedbackOptions(SPEC, tmp_path)
    other = Feedback(options, Snapshots(tmp_path), names=STATIC, context=wider)
    assert (other.describe()["version"], other.describe()["experts"]) == (4, {})


def test_experts_that_leave_take_what_was_learnt_of_them_along() -> None:
    feedback = made()
    answered(feedback, "late", {"a": 1.0})
    teach(feedback, 3)
    feedback.retain({"b", "c", "new"})
    assert feedback.describe()["experts"] == {}
    assert not rate(feedback, "late", 1.0).applied
    assert feedback.describe()["experts"] == {}


def test_a_router_that_does_not_tell_its_features_is_watched_first() -> None:
    feedback = Feedback(FeedbackOptions(SPEC), Snapshots(None), names=STATIC)
    prompts = torch.randn(65, 6, generator=torch.Generator().manual_seed(0))
    decisions = [feedback.decide(prompt, STATIC, 0.05, explore=True) for prompt in prompts]
    assert decisions[:63] == [None] * 63
    assert decisions[-1] is not None


def test_feedback_that_is_off_says_so() -> None:
    answer = call(ScriptedBackend(), {"request_id": "x", "reward": 1}, "/v1/feedback")
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "feedback_disabled")
    assert "TWINSERVE_FEEDBACK" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        {"reward": 1},
        {"request_id": "x"},
        {"request_id": "", "reward": 1},
        {"request_id": "x", "reward": 1.5},
        {"request_id": "x", "reward": True},
        {"request_id": "x", "reward": "1"},
        {"request_id": "x", "reward": 1, "choice": -1},
        {"request_id": "x", "reward": 1, "stars": 5},
        BODY,
    ],
)
def test_a_wrong_rating_is_refused(body: dict[str, Any]) -> None:
    answer = call(ScriptedBackend(), body, "/v1/feedback")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")


def test_an_answer_that_the_guard_left_to_the_shared_expert_teaches_nothing():
    generator = torch.Generator().manual_seed(0)
    apart = torch.tensor([5.0, 5, 5, 0, 0, 0])
    near = {
        "a": torch.randn(40, 6, generator=generator) + apart,
        "b": torch.randn(40, 6, generator=generator) + apart.flip(0),
    }
    router = GaussianRouter.fit(near, near, FeatureSpec(pooling="mean"), guard_rate=0.05)
    catalogue = Catalogue()
    for name in near:
        catalogue.switch([ExpertKey(name, 1)])
    dispatcher = Dispatcher(catalogue, router, RoutingDefaults())
    dispatcher.adjuster = made()
    known = dispatcher.route(near["a"][0], RoutingChoice())[1]
    strange = dispatcher.route(torch.tensor([9.0, -9, 9, -9, 9, -9]), RoutingChoice())[1]
    assert (known.abstained, strange.abstained) == (False, True)
    assert known.decision is not None
    assert strange.decision is None
    assert not strange.explored
