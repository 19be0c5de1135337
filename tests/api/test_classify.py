"""`/v1/classify` over real HTTP: routed and named experts, limits, errors, load, metrics."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from experts.errors import BundleError
from service.serve import assemble
from service.settings import Settings
from tests.api.harness import Served, error_of, eventually, serving
from tests.fixtures.classifiers import LABELS, TinyClassifiers, task_text, tiny_classifiers
from tests.fixtures.tiny import TinyFamily


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> TinyClassifiers:
    return tiny_classifiers(tmp_path_factory.mktemp("classifiers"))


@pytest.fixture(scope="module")
def labelling(family: TinyFamily, classifiers: TinyClassifiers) -> Iterator[Served]:
    with serving(family.bundle, classifier=classifiers.bundle, max_prompts=8, api_keys="k") as served:
        served.http.headers["Authorization"] = "Bearer k"
        yield served


def classify(served: Served, **body: Any) -> dict[str, Any]:
    answer = served.post("/v1/classify", body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def refusal(served: Served, status: int, **body: Any) -> dict[str, Any]:
    answer = served.post("/v1/classify", body)
    assert answer.status_code == status, answer.text
    return error_of(answer)


def test_a_text_gets_the_label_set_of_the_expert_that_the_router_chose(labelling: Served) -> None:
    for task, labels in LABELS.items():
        answer = classify(labelling, input=task_text(task, 41))
        assert answer["object"] == "list"
        assert answer["model"] == "labels"
        [choice] = answer["data"]
        assert choice["expert"] == task
        assert set(choice["scores"]) == set(labels)
        assert choice["num_classes"] == len(labels) == len(choice["probs"])
        assert choice["score"] == max(choice["probs"]) == choice["scores"][choice["label"]]
        assert sum(choice["probs"]) == pytest.approx(1, abs=1e-5)
        assert choice["routing"]["gates"] == {task: 1.0}
        assert choice["routing"]["confidence"] > 0.5


def test_texts_of_one_request_are_answered_in_their_order(labelling: Served) -> None:
    texts = [task_text(task, 41) for task in LABELS]
    answer = classify(labelling, model="labels", input=texts)
    assert [choice["index"] for choice in answer["data"]] == [0, 1, 2]
    assert [choice["expert"] for choice in answer["data"]] == list(LABELS)
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] > 0


def test_an_expert_can_be_named(labelling: Served) -> None:
    [choice] = classify(labelling, model="size", input=task_text("tone", 41))["data"]
    assert choice["expert"] == "size"
    assert choice["routing"]["confidence"] is None


def test_gates_mix_encoders_and_the_largest_ones_head_answers(labelling: Served) -> None:
    gates = {"size": 0.6, "tone": 0.4}
    [choice] = classify(labelling, gates=gates, input=task_text("tone", 41))["data"]
    [alone] = classify(labelling, model="size", input=task_text("tone", 41))["data"]
    assert choice["expert"] == "size"
    assert choice["routing"]["gates"] == gates
    assert choice["probs"] != alone["probs"]


def test_routing_options_reach_the_router(labelling: Served) -> None:
    body = {"top_k": 3, "threshold": 0.0}
    [choice] = classify(labelling, input="ant leaf awful", routing=body)["data"]
    assert sum(choice["routing"]["gates"].values()) == 1


def test_requests_with_different_gates_share_passes_and_none_changes_another(labelling: Served) -> None:
    bodies = [{"model": name, "input": task_text(name, number)} for number in range(8) for name in LABELS]
    alone = [classify(labelling, **body)["data"] for body in bodies]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda body: classify(labelling, **body)["data"], bodies))
    for one, other in zip(alone, together, strict=True):
        assert one[0]["label"] == other[0]["label"]
        assert one[0]["probs"] == pytest.approx(other[0]["probs"], abs=1e-4)


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({"input": []}, 400, "invalid_request", "input"),
        ({"input": ""}, 400, "invalid_request", "input"),
        ({"input": ["ant", " "]}, 400, "invalid_request", "input[1]"),
        ({"input": 3}, 400, "invalid_request", "input"),
        ({"input": ["ant"] * 9}, 400, "limit_exceeded", "input"),
        ({"input": "ant " * 50}, 400, "context_length_exceeded", "input"),
        ({"input": "ant", "truncate_prompt_tokens": 99}, 400, "limit_exceeded", "truncate_prompt_tokens"),
        ({"input": "ant", "model": "nobody"}, 404, "model_not_found", "model"),
        ({"input": "ant", "model": "shared"}, 404, "model_not_found", "model"),
        ({"input": "ant", "gates": {"nobody": 1}}, 400, "unknown_expert", "gates.nobody"),
        ({"input": "ant", "gates": {"size": 99}}, 400, "limit_exceeded", "gates.size"),
        ({"input": "ant", "gates": {"size": -1}}, 400, "invalid_request", "gates"),
        ({"input": "ant", "gates": {}}, 400, "invalid_request", "gates"),
        ({"input": "ant", "gates": {"size": 1}, "model": "tone"}, 400, "invalid_request", "gates"),
        ({"input": "ant", "gates": {"size": 1}, "routing": {"top_k": 1}}, 400, "invalid_request", "routing"),
        ({"input": "ant", "routing": {"top_k": 1}, "model": "tone"}, 400, "invalid_request", "routing"),
        ({"input": "ant", "temperature": 1}, 400, "invalid_request", "temperature"),
        ({"input": "ant", "activation": False}, 400, "unsupported_parameter", "activation"),
        ({}, 400, "invalid_request", "input"),
    ],
)
def test_a_body_that_cannot_be_served_is_refused_by_field(
    labelling: Served, body: dict[str, Any], status: int, code: str, param: str
) -> None:
    error = refusal(labelling, status, **body)
    assert (error["code"], error["param"]) == (code, param)


def test_a_lone_surrogate_is_no_text(labelling: Served) -> None:
    answer = labelling.http.post(
        "/v1/classify", content=rb'{"input": "ant \ud800"}', headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 400
    assert error_of(answer)["code"] == "invalid_request"


def test_a_long_text_can_be_cut(labelling: Served) -> None:
    answer = classify(labelling, input="ant " * 50, truncate_prompt_tokens=10)
    assert answer["usage"]["prompt_tokens"] == 10


def test_a_key_is_needed_as_everywhere(labelling: Served) -> None:
    answer = labelling.post("/v1/classify", {"input": "ant"}, headers={"Authorization": "Bearer wrong"})
    assert answer.status_code == 401


def test_models_lists_the_classifier_once(labelling: Served) -> None:
    models = labelling.http.get("/v1/models").json()["data"]
    assert [model["id"] for model in models if model["kind"] == "classifier"] == ["labels"]
    assert labelling.http.get("/v1/models/labels").json()["max_model_len"] == 40


def test_texts_and_batches_are_counted(labelling: Served) -> None:
    before = labelling.metric('twinserve_classify_texts_total{outcome="ok"}')
    classify(labelling, input=["ant", "leaf"])
    assert labelling.metric('twinserve_classify_texts_total{outcome="ok"}') == before + 2
    assert eventually(
        lambda: (
            labelling.metric("twinserve_classify_batch_texts_sum")
            == labelling.metric('twinserve_classify_texts_total{outcome="ok"}')
        )
    )


def test_without_a_classifier_the_answer_says_how_to_get_one(server: Served) -> None:
    answer = server.post("/v1/classify", {"input": "ant"})
    assert answer.status_code == 404
    error = error_of(answer)
    assert error["code"] == "classifier_disabled"
    assert "TWINSERVE_CLASSIFIER" in error["message"]


def test_a_bundle_of_the_wrong_kind_stops_the_start(family: TinyFamily, classifiers: TinyClassifiers) -> None:
    settings = Settings(bundle=family.bundle, classifier=family.bundle, port=0, threads=1, dtype="float32")
    with pytest.raises(BundleError, match="language model"):
        assemble(settings, lambda url, runtime: None)


def test_a_classifier_must_not_share_a_name_with_a_model(family: TinyFamily, tmp_path: Path) -> None:
    same = tiny_classifiers(tmp_path, name="tiny", router=False)
    settings = Settings(bundle=family.bundle, classifier=same.bundle, port=0, threads=1, dtype="float32")
    with pytest.raises(BundleError, match="another name"):
        assemble(settings, lambda url, runtime: None)
