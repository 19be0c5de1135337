"""What names mean: aliases, generations, names that are still on their way, and never another expert instead."""

from collections.abc import Callable, Collection
from typing import Any

import pytest

from service.core import ExpertStatus, GenerationRequest, RoutingChoice
from service.errors import (
    ExpertNotLoadedError,
    ExpertUnavailableError,
    RegistryUnavailableError,
    TwinserveError,
    UnknownExpertError,
)
from tests.unit.service.backend import ScriptedBackend, ScriptedNames
from tests.unit.service.edge import BODY, call

ALPHA = ExpertStatus("alpha", 2, "active", True, 0, 10, 4)
BETA = ExpertStatus("beta", 1, "active", True, 0, 10, 4)
CANARY = ExpertStatus("alpha", 3, "trial", False, 0, 10, 4)
STAGED = ExpertStatus("new", 1, "staged", False, 0, 10, 4)
OLD = ExpertStatus("alpha", 1, "retired", False, 1, 10, 4)
ALIASES = {"stable": "alpha", "other": "beta"}


def backend(*statuses: ExpertStatus) -> ScriptedBackend:
    return ScriptedBackend(statuses=statuses or (ALPHA, BETA, CANARY, STAGED, OLD))


def chosen(body: dict[str, Any], names: ScriptedNames | None = None) -> RoutingChoice:
    """The routing of the only request that a body becomes."""
    asked = backend()
    answer = call(asked, {**BODY, **body}, names=names or ScriptedNames(ALIASES))
    assert answer.status_code == 200, answer.text
    [request] = asked.requests
    return request.routing


@pytest.mark.parametrize(
    ("model", "gates", "generations"),
    [
        ("alpha", {"alpha": 1.0}, {}),
        ("stable", {"alpha": 1.0}, {}),
        ("alpha@2", {"alpha": 1.0}, {"alpha": 2}),
        ("stable@2", {"alpha": 1.0}, {"alpha": 2}),
        ("alpha@3", {"alpha": 1.0}, {"alpha": 3}),
        ("new@1", {"new": 1.0}, {"new": 1}),
        ("shared", {}, {}),
    ],
)
def test_a_model_is_a_name_an_alias_or_a_generation_that_can_be_reached(
    model: str, gates: dict[str, float], generations: dict[str, int]
) -> None:
    assert chosen({"model": model}) == RoutingChoice(gates, generations=generations)


def test_gates_name_aliases_and_generations_too() -> None:
    routing = chosen({"gates": {"stable@3": 0.5, "other": 0.25, "new@1": 0}})
    assert routing == RoutingChoice(
        {"alpha": 0.5, "beta": 0.25, "new": 0.0}, generations={"alpha": 3, "new": 1}
    )


@pytest.mark.parametrize(
    "model", ["alpha@1", "alpha@4", "new", "new@2", "alpha@", "@2", "alpha@x", "alpha@٣", "x" * 256, "Alpha"]
)
def test_what_cannot_be_reached_is_no_model(model: str) -> None:
    names = ScriptedNames(ALIASES)
    answer = call(backend(), {**BODY, "model": model}, names=names)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    assert len(names.awaited) == 1


@pytest.mark.parametrize("second", ["stable", "alpha@3", "stable@2"])
def test_two_gates_of_one_expert_are_refused_under_the_second(second: str) -> None:
    asked = backend()
    answer = call(asked, {**BODY, "gates": {"alpha": 0.5, second: 0.5}}, names=ScriptedNames(ALIASES))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == f"gates.{second}"
    assert not asked.requests


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"model": "soon", "prompt": "a"}, "model"),
        (
            "/v1/completions",
            {"model": "family", "prompt": "a", "gates": {"alpha": 1, "soon": 1}},
            "gates.soon",
        ),
        ("/v1/completions", {"model": "soon", "prompt": "a", "lora": [{"id": 0, "scale": 1}]}, "model"),
        ("/v1/chat/completions", {"model": "soon", "messages": [{"role": "user", "content": "a"}]}, "model"),
        ("/v1/responses", {"model": "soon", "input": "a"}, "model"),
        ("/v1/embeddings", {"model": "soon", "input": "a"}, "model"),
        ("/v1/route", {"model": "soon", "prompt": "a"}, "model"),
        ("/tokenize", {"model": "soon", "prompt": "a"}, "model"),
        ("/completion", {"model": "soon", "prompt": "a"}, "model"),
        ("/completion", {"prompt": "a", "gates": {"soon": 1}}, "gates.soon"),
        ("/generate", {"inputs": "a", "parameters": {"adapter_id": "soon"}}, None),
        (
            "/generate",
            {"inputs": "a", "parameters": {"merged_adapters": {"ids": ["soon"], "weights": [1]}}},
            None,
        ),
    ],
)
@pytest.mark.parametrize("kind", [ExpertNotLoadedError, ExpertUnavailableError, RegistryUnavailableError])
def test_an_expert_that_is_not_here_yet_is_503_and_nobody_answers_instead(
    path: str, body: dict[str, Any], param: str | None, kind: type[TwinserveError]
) -> None:
    def never(_: Collection[str]) -> None:
        raise kind("not here yet", param="model", retry_after=1.0)

    asked = backend()
    names = ScriptedNames(ALIASES, never)
    answer = call(asked, body, path, names=names)
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    assert names.awaited == [["soon"]]
    assert not asked.requests
    if param is not None:
        assert answer.json()["error"]["param"] == param


def test_an_expert_that_arrives_while_its_request_waits_answers_it() -> None:
    asked = backend(ALPHA)

    def arrives(_: Collection[str]) -> None:
        asked.statuses = (ALPHA, BETA)

    answer = call(asked, {**BODY, "model": "beta@1"}, names=ScriptedNames(ALIASES, arrives))
    assert answer.status_code == 200
    assert asked.requests[0].routing == RoutingChoice({"beta": 1.0}, generations={"beta": 1})


def test_an_alias_that_is_new_here_is_waited_for_by_its_own_name_and_then_resolved() -> None:
    aliases: dict[str, str] = {}
    names = ScriptedNames(aliases, lambda _: aliases.update(fresh="beta"))
    assert chosen({"gates": {"fresh": 1}}, names).gates == {"beta": 1.0}
    assert names.awaited == [["fresh"]]


def test_an_aliased_generation_is_waited_for_by_its_experts_name() -> None:
    names = ScriptedNames(ALIASES)
    assert call(backend(), {**BODY, "model": "stable@9"}, names=names).status_code == 404
    assert names.awaited == [["alpha@9"]]


def test_what_is_here_is_never_waited_for() -> None:
    names = ScriptedNames(ALIASES)
    for body in ({"model": "family"}, {"model": "shared"}, {"model": "stable"}, {"gates": {"alpha@3": 1}}):
        chosen(body, names)
    assert not names.awaited


def test_a_request_that_names_thousands_of_experts_makes_nobody_wait_for_them() -> None:
    names = ScriptedNames()
    answer = call(backend(), {**BODY, "gates": {f"x{index}": 1 for index in range(5000)}}, names=names)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "limit_exceeded"
    assert not names.awaited


@pytest.mark.parametrize("given", ["nobody", "stable@7"])
def test_an_unknown_gate_is_refused_under_the_name_that_the_client_gave(given: str) -> None:
    answer = call(backend(), {**BODY, "gates": {given: 1}}, names=ScriptedNames(ALIASES))
    assert answer.status_code == 400
    assert answer.json()["error"] | {"message": ""} == {
        "message": "",
        "type": "invalid_request_error",
        "param": f"gates.{given}",
        "code": UnknownExpertError.code,
    }


def retired(refusal: Callable[[], Exception]) -> ScriptedBackend:
    """An expert that is gone when its request is admitted."""

    class Gone(ScriptedBackend):
        def submit(self, request: GenerationRequest) -> Any:
            raise refusal()

    return Gone(statuses=(ALPHA,))


def test_an_expert_that_is_retired_under_way_is_missed_as_the_model_that_it_was() -> None:
    asked = retired(lambda: UnknownExpertError("no expert named 'alpha'", param="gates.alpha"))
    answer = call(asked, {**BODY, "model": "stable"}, names=ScriptedNames(ALIASES))
    assert answer.status_code == 404
    assert answer.json()["error"]["param"] == "model"


def test_models_lists_experts_aliases_and_generations_on_trial_with_what_they_belong_to() -> None:
    names = ScriptedNames({**ALIASES, "dangling": "gone"})
    listed = call(backend(), None, "/v1/models", "GET", names=names).json()["data"]
    assert [(one["id"], one["kind"], one["parent"], one["generation"]) for one in listed] == [
        ("family", "router", None, None),
        ("alpha", "expert", "family", 2),
        ("beta", "expert", "family", 1),
        ("alpha@3", "generation", "alpha", 3),
        ("new@1", "generation", "new", 1),
        ("other", "alias", "beta", 1),
        ("stable", "alias", "alpha", 2),
        ("shared", "shared", "family", None),
    ]
    assert {one["root"] for one in listed} == {"family"}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("stable", "stable"),
        ("alpha@2", "alpha"),
        ("stable@3", "alpha@3"),
        ("new@1", "new@1"),
        ("shared", "shared"),
    ],
)
def test_each_name_that_can_be_asked_for_is_described(name: str, found: str) -> None:
    answer = call(backend(), None, f"/v1/models/{name}", "GET", names=ScriptedNames(ALIASES))
    assert answer.status_code == 200
    assert answer.json()["id"] == found


@pytest.mark.parametrize("name", ["nobody", "alpha@1", "a%2Fb", "%F0%9F%90%8D", "x" * 300])
def test_a_name_that_cannot_be_asked_for_is_not_described(name: str) -> None:
    answer = call(backend(), None, f"/v1/models/{name}", "GET", names=ScriptedNames(ALIASES))
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
