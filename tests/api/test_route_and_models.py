import openai

from tests.api.harness import Served, error_of

SORT = "SORT: river zebra river apple"
ADD = "Add 5 and 6."


def test_route_explains_without_generating(server: Served) -> None:
    before = server.metric("twinserve_generation_tokens_total")
    answer = server.post("/v1/route", {"prompt": [SORT, ADD]}).json()
    assert [item["index"] for item in answer["data"]] == [0, 1]
    assert [list(item["gates"]) for item in answer["data"]] == [["gamma"], ["alpha"]]
    first = answer["data"][0]
    assert first["scores"].keys() == {"alpha", "beta", "gamma"}
    assert abs(sum(first["scores"].values()) - 1) < 1e-4
    assert first["confidence"] == max(first["scores"].values())
    assert first["generations"] == {"gamma": 1}
    assert first["router_generation"] == 1
    assert answer["usage"]["prompt_tokens"] > 0
    assert server.metric("twinserve_generation_tokens_total") == before


def test_route_says_what_a_completion_then_does(server: Served) -> None:
    [told] = server.post("/v1/route", {"prompt": SORT}).json()["data"]
    done = server.complete(prompt=SORT, max_tokens=1)["routing"]
    assert {name: told[name] for name in done} == done


def test_route_takes_one_chat_or_many(server: Served) -> None:
    chat = [{"role": "user", "content": SORT}]
    one = server.post("/v1/route", {"messages": chat}).json()["data"]
    many = server.post("/v1/route", {"messages": [chat, [{"role": "user", "content": ADD}]]}).json()["data"]
    assert one == many[:1]
    assert list(many[1]["gates"]) == ["alpha"]


def test_route_obeys_top_k_and_threshold(server: Served) -> None:
    body = {"prompt": SORT, "routing": {"top_k": 3, "threshold": 0}}
    answer = server.post("/v1/route", body)
    assert answer.status_code == 200
    assert sum(answer.json()["data"][0]["gates"].values()) == 1


def test_route_wants_exactly_one_kind_of_input(server: Served) -> None:
    for body in ({}, {"prompt": ADD, "messages": [{"role": "user", "content": ADD}]}):
        answer = server.post("/v1/route", body)
        assert answer.status_code == 400
        assert error_of(answer)["message"] == "Give either 'prompt' or 'messages'."


def test_models_lists_the_router_every_expert_and_the_shared_expert(client: openai.OpenAI) -> None:
    models = {model.id: model.model_dump() for model in client.models.list()}
    assert list(models) == ["tiny", "alpha", "beta", "gamma", "shared"]
    assert models["tiny"]["kind"] == "router"
    assert models["alpha"]["generation"] == 1
    assert client.models.retrieve("beta").id == "beta"


def test_an_unknown_model_is_not_found(server: Served) -> None:
    answer = server.http.get("/v1/models/nobody")
    assert answer.status_code == 404
    assert error_of(answer)["code"] == "model_not_found"


def test_version_and_probes_answer(server: Served) -> None:
    assert server.http.get("/version").json()["version"]
    for path in ("/health", "/health/live", "/health/ready"):
        answer = server.http.get(path)
        assert answer.status_code == 200
        assert answer.json() == {"status": "ok"}


def test_metrics_follow_the_requests(server: Served) -> None:
    before = {
        name: server.metric(name)
        for name in (
            'twinserve_request_success_total{finished_reason="length"}',
            "twinserve_time_to_first_token_seconds_count",
            'twinserve_gate_weight_mass_total{expert="beta"}',
            "twinserve_generation_tokens_total",
            'twinserve_steps_total{mode="factored"}',
        )
    }
    server.complete(model="beta", max_tokens=5, ignore_eos=True)
    after = {name: server.metric(name) - value for name, value in before.items()}
    assert list(after.values()) == [1, 1, 1, 5, 5]
    assert server.metric("twinserve_num_requests_running") == 0
    assert server.metric("twinserve_experts_registered") == 3
    assert server.metric("twinserve_engine_up") == 1


def test_metrics_speak_openmetrics_when_asked(server: Served) -> None:
    plain = server.http.get("/metrics")
    assert plain.headers["content-type"].startswith("text/plain")
    opened = server.http.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert opened.headers["content-type"].startswith("application/openmetrics-text")
    assert opened.text.rstrip().endswith("# EOF")
