"""Options of the router, pinned generations, and headers that tell what made an answer."""

import math
from typing import Any

import pytest

from tests.api.harness import Served, error_of

ADD = "Add 5 and 6."
KIND = "mlp"


def scores(server: Served, **routing: Any) -> dict[str, float]:
    [told] = server.post("/v1/route", {"prompt": ADD, "routing": routing}).json()["data"]
    return dict(told["scores"])


def test_a_temperature_divides_the_routers_logits(server: Served) -> None:
    plain, warm = scores(server), scores(server, temperature=4.0)
    powers = {name: value**0.25 for name, value in plain.items()}
    for name, value in warm.items():
        assert value == pytest.approx(powers[name] / sum(powers.values()), rel=1e-4)
    cold = scores(server, temperature=0.01)
    assert max(cold.values()) == pytest.approx(1.0)
    assert math.isclose(sum(warm.values()), 1, rel_tol=1e-6)


def test_a_high_temperature_mixes_what_the_router_would_not(server: Served) -> None:
    routing = {"temperature": 100.0, "top_k": 3, "threshold": 0.0, "abstain": False}
    told = server.complete(prompt=ADD, max_tokens=1, routing=routing)["routing"]
    assert len(told["gates"]) == 3
    assert sum(told["gates"].values()) == 1
    [explained] = server.post("/v1/route", {"prompt": ADD, "routing": routing}).json()["data"]
    assert explained["gates"] == told["gates"]


def test_the_router_can_be_named_and_another_is_refused(server: Served) -> None:
    named = server.complete(prompt=ADD, max_tokens=1, routing={"router": KIND})
    assert named["routing"] == server.complete(prompt=ADD, max_tokens=1)["routing"]
    for path, body in (
        ("/v1/route", {"prompt": ADD}),
        ("/v1/completions", {"model": "tiny", "prompt": ADD}),
        ("/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": ADD}]}),
    ):
        answer = server.post(path, {**body, "routing": {"router": "oracle"}})
        assert answer.status_code == 400
        assert error_of(answer)["param"] == "routing.router"
        assert KIND in error_of(answer)["message"]


def test_an_expert_can_be_pinned_to_its_live_generation(server: Served) -> None:
    pinned = server.complete(model="alpha@1", prompt=ADD, max_tokens=4, temperature=0)
    plain = server.complete(model="alpha", prompt=ADD, max_tokens=4, temperature=0)
    assert pinned["choices"] == plain["choices"]
    assert server.http.get("/v1/models/alpha@1").json() == server.http.get("/v1/models/alpha").json()
    for model in ("alpha@2", "alpha@0", "alpha@", "alpha@one", "nobody@1", "@1", "alpha@" + "9" * 50):
        answer = server.post("/v1/completions", {"model": model, "prompt": ADD})
        assert answer.status_code == 404, model
        assert error_of(answer)["param"] == "model"
        assert server.http.get(f"/v1/models/{model}").status_code == 404
    assert "1 is" in error_of(server.post("/v1/completions", {"model": "alpha@2", "prompt": ADD}))["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_headers_tell_the_pattern_and_its_generations(server: Served, path: str, stream: bool) -> None:
    body: dict[str, Any] = {"model": "tiny", "max_tokens": 3, "stream": stream}
    body |= {"prompt": ADD} if path == "/v1/completions" else {"messages": [{"role": "user", "content": ADD}]}
    routed = server.post(path, body).headers
    assert routed["x-twinserve-pattern"] == "alpha@1:1"
    assert routed["x-twinserve-generations"] == "alpha=1"
    assert routed["x-twinserve-router-generation"] == "1"
    mixed = server.post(path, {**body, "gates": {"alpha": 0.5, "beta": -0.25}}).headers
    assert mixed["x-twinserve-pattern"] == "alpha@1:0.5+beta@1:-0.25"
    assert mixed["x-twinserve-generations"] == "alpha=1,beta=1"
    assert "x-twinserve-router-generation" not in mixed
    shared = server.post(path, {**body, "model": "shared"}).headers
    assert (shared["x-twinserve-pattern"], shared["x-twinserve-generations"]) == ("shared", "none")


def test_prompts_that_were_routed_differently_have_no_common_header(server: Served) -> None:
    body = {"model": "tiny", "prompt": [ADD, "SORT: river zebra river apple"], "max_tokens": 1}
    assert "x-twinserve-pattern" not in server.post("/v1/completions", body).headers
    same = server.post("/v1/completions", {**body, "prompt": [ADD, ADD], "n": 2})
    assert same.headers["x-twinserve-pattern"] == "alpha@1:1"
    assert [choice["routing"]["pattern"] for choice in same.json()["choices"]] == ["alpha@1:1"] * 4
