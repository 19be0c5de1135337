"""Generations of an expert: which one serves, for whom, and that every answer is made of those that it names."""

import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.harness import ADMIN_KEY, error_of, eventually, serving
from tests.api.operators import PROMPTS, Operator
from tests.fixtures.tiny import TinyFamily, tiny_family, tiny_lora

SOURCES = ("one", "two", "three")


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> TinyFamily:
    """A family whose experts these tests change."""
    return tiny_family(tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="module")
def root(own: TinyFamily, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    for seed, name in enumerate(SOURCES, 91):
        tiny_lora(folder / name, own.base, rank=4, seed=seed)
    return folder


@pytest.fixture(scope="module")
def admin(own: TinyFamily, root: Path) -> Iterator[Operator]:
    with serving(own.bundle, admin_key=ADMIN_KEY, experts_root=root) as server:
        yield Operator(server)


@pytest.fixture(scope="module")
def truth(admin: Operator) -> dict[str, str]:
    """Source → what an expert made of it alone answers."""
    for name in SOURCES:
        admin.registered(name=f"truth-{name}", path=name)
    return {name: admin.text(model=f"truth-{name}")[0] for name in SOURCES}


def test_sources_differ(truth: dict[str, str]) -> None:
    assert len(set(truth.values())) == len(SOURCES)


@pytest.fixture
def name(request: pytest.FixtureRequest, admin: Operator, truth: dict[str, str]) -> str:
    """An expert of this test alone: generation 1 of source one, 2 of two, which serves."""
    name = f"x-{zlib.crc32(request.node.name.encode())}"
    admin.registered(name=name, path="one")
    admin.registered(name=name, path="two", expected_generation=1)
    return name


def test_an_expert_goes_back_and_forth_at_once(admin: Operator, truth: dict[str, str], name: str) -> None:
    assert admin.text(model=name) == (truth["two"], {name: 2})
    back = admin.post(f"/experts/{name}/rollback", {})
    assert back.status_code == 200, back.text
    assert back.headers["etag"] == '"1"'
    assert (back.json()["generation"], back.json()["loaded"]) == (1, True)
    assert admin.text(model=name) == (truth["one"], {name: 1})
    assert admin.post(f"/experts/{name}/activate", {"generation": 2}).status_code == 200
    assert admin.text(model=name) == (truth["two"], {name: 2})
    named = admin.post(f"/experts/{name}/rollback", {"generation": 1, "expected_generation": 2})
    assert named.status_code == 200
    assert admin.text(model=name, gates=None) == (truth["one"], {name: 1})
    listed = admin.get(f"/experts/{name}/generations")["data"]
    assert [(one["generation"], one["state"], one["serving"]) for one in listed] == [
        (2, "ready", False),
        (1, "ready", True),
    ]
    # Numbers are never given twice.
    assert admin.registered(name=name, path="three", replace=True)["generation"] == 3


def test_without_an_older_generation_there_is_nothing_to_go_back_to(admin: Operator) -> None:
    admin.registered(name="single", path="one")
    for body in ({}, {"generation": 7}):
        answer = admin.post("/experts/single/rollback", body)
        assert answer.status_code in (404, 409)
        assert error_of(answer)["code"] in ("wrong_state", "record_not_found")
    assert admin.text(model="single")[1] == {"single": 1}


def test_a_failed_generation_never_goes_live(admin: Operator, root: Path, name: str) -> None:
    (root / "void").mkdir(exist_ok=True)
    (root / "void" / "adapter_config.json").write_text("{")
    assert admin.register(name=name, path="void", replace=True).status_code == 422
    answer = admin.post(f"/experts/{name}/activate", {"generation": 3})
    assert answer.status_code == 409, answer.text
    assert error_of(answer)["code"] == "wrong_state"
    assert admin.get(f"/experts/{name}/generations/3")["state"] == "failed"
    assert admin.text(model=name)[1] == {name: 2}


@pytest.mark.parametrize("action", ["rollback", "activate", "pin", "trial"])
def test_a_change_builds_on_the_generation_that_it_names_or_is_refused(
    admin: Operator, truth: dict[str, str], name: str, action: str
) -> None:
    method, body = "POST", {"generation": 1}
    if action == "trial":
        method, body = "PUT", {"generation": 1, "kind": "canary", "percent": 50}
    path = f"/experts/{name}/{action}"
    stale = admin.ask(method, path, {**body, "expected_generation": 1})
    assert stale.status_code == 409, stale.text
    assert error_of(stale)["code"] == "conflict"
    header = admin.ask(method, path, body, headers={"If-Match": '"1"'})
    assert header.status_code == 412, header.text
    assert error_of(header)["code"] == "precondition_failed"
    assert error_of(header)["param"] == "If-Match"
    both = admin.ask(method, path, {**body, "expected_generation": 1}, headers={"If-Match": '"2"'})
    assert both.status_code == 400
    assert admin.text(model=name) == (truth["two"], {name: 2})
    assert admin.ask(method, path, body, headers={"If-Match": '"2"'}).status_code == 200
    admin.ask("DELETE", f"/experts/{name}/trial")


@pytest.mark.parametrize("action", ["disable", "enable", ""])
def test_if_match_guards_what_has_no_body(admin: Operator, name: str, action: str) -> None:
    method, path = ("POST", f"/experts/{name}/{action}") if action else ("DELETE", f"/experts/{name}")
    if action == "enable":
        assert admin.post(f"/experts/{name}/disable").status_code == 200
    assert admin.ask(method, path, headers={"If-Match": '"1"'}).status_code == 412
    assert admin.ask(method, path, headers={"If-Match": '"2"'}).status_code == 200


@pytest.mark.parametrize("value", ["", "0", '"0"', "two", '"1", "2"', "-1", '"' + "9" * 30 + '"', "x" * 65])
def test_a_strange_if_match_is_refused(admin: Operator, name: str, value: str) -> None:
    answer = admin.post(f"/experts/{name}/rollback", {}, headers={"If-Match": value})
    assert answer.status_code == 400, answer.text
    assert error_of(answer)["param"] == "If-Match"
    assert admin.text(model=name)[1] == {name: 2}


def test_a_registration_builds_on_the_generation_of_its_if_match(
    admin: Operator, truth: dict[str, str], name: str
) -> None:
    stale = admin.register({"If-Match": '"1"'}, name=name, path="three")
    assert stale.status_code == 412, stale.text
    good = admin.register({"If-Match": '"2"'}, name=name, path="three")
    assert good.status_code == 201, good.text
    assert admin.text(model=name) == (truth["three"], {name: 3})
    assert admin.register({"If-Match": "*"}, name="nobody-yet", path="one").status_code == 412
    assert admin.register({"If-Match": "*"}, name=name, path="one").status_code == 201
    assert admin.text(model=name) == (truth["one"], {name: 4})


def test_a_pinned_generation_stays_whatever_is_registered(
    admin: Operator, truth: dict[str, str], name: str
) -> None:
    pinned = admin.post(f"/experts/{name}/pin", {"generation": 1})
    assert (pinned.json()["generation"], pinned.json()["pinned"]) == (1, True)
    made = admin.registered(name=name, path="three", replace=True)
    assert (made["generation"], made["new_generation"]) == (1, 3)
    assert admin.text(model=name) == (truth["one"], {name: 1})
    assert admin.ask("DELETE", f"/experts/{name}/pin").json()["pinned"] is False
    assert admin.post(f"/experts/{name}/activate", {"generation": 3}).status_code == 200
    assert admin.text(model=name) == (truth["three"], {name: 3})


def test_a_generation_that_is_not_to_be_activated_waits_until_it_is(
    admin: Operator, truth: dict[str, str], name: str
) -> None:
    made = admin.registered(name=name, path="three", replace=True, activate=False)
    assert (made["generation"], made["new_generation"]) == (2, 3)
    assert admin.text(model=name) == (truth["two"], {name: 2})
    assert admin.post(f"/experts/{name}/activate", {"generation": 3}).status_code == 200
    assert admin.text(model=name) == (truth["three"], {name: 3})


def test_a_new_expert_that_is_not_to_be_activated_serves_nobody_until_it_is(
    admin: Operator, truth: dict[str, str]
) -> None:
    made = admin.registered(name="waits", path="one", activate=False)
    assert (made["generation"], made["new_generation"]) == (None, 1)
    assert admin.get("/experts/waits")["generation"] is None
    assert "waits" in {one["name"] for one in admin.get("/experts")["data"]}
    assert admin.served.post("/v1/completions", {"model": "waits", "prompt": "a"}).status_code == 404
    assert admin.post("/experts/waits/activate", {"generation": 1}).status_code == 200
    assert admin.text(model="waits") == (truth["one"], {"waits": 1})


def test_a_disabled_expert_serves_nobody_and_keeps_everything(
    admin: Operator, truth: dict[str, str], name: str
) -> None:
    assert admin.post(f"/experts/{name}/disable").json()["state"] == "disabled"
    refused = admin.served.post("/v1/completions", {"model": name, "prompt": "a"})
    assert refused.status_code == 404
    gates = admin.served.post("/v1/completions", {"model": "tiny", "prompt": "a", "gates": {name: 1}})
    assert gates.status_code == 400
    assert error_of(gates)["code"] == "unknown_expert"
    assert name not in {model["id"] for model in admin.served.http.get("/v1/models").json()["data"]}
    assert admin.get(f"/experts/{name}")["state"] == "disabled"
    assert name in {one["name"] for one in admin.get("/experts", state="disabled")["data"]}
    assert admin.post(f"/experts/{name}/enable").json()["state"] == "active"
    assert admin.text(model=name) == (truth["two"], {name: 2})


def test_a_retired_expert_is_gone_and_its_name_free_with_numbers_that_go_on(
    admin: Operator, truth: dict[str, str], name: str
) -> None:
    gone = admin.ask("DELETE", f"/experts/{name}")
    assert (gone.status_code, gone.json()["state"]) == (200, "retired")
    assert name not in [one["name"] for one in admin.get("/experts")["data"]]
    assert name in [one["name"] for one in admin.get("/experts", state="retired")["data"]]
    assert admin.ask("GET", f"/experts/{name}").status_code == 404
    assert admin.ask("DELETE", f"/experts/{name}").status_code == 404
    for path in ("rollback", "pin"):
        assert admin.post(f"/experts/{name}/{path}", {}).status_code == 404
    assert admin.served.post("/v1/completions", {"model": name, "prompt": "a"}).status_code == 404
    assert len(admin.get(f"/experts/{name}/generations")["data"]) == 2
    assert admin.registered(name=name, path="three")["generation"] == 3
    assert admin.text(model=name) == (truth["three"], {name: 3})


def test_an_alias_stands_for_an_expert_everywhere_and_answers_tell_the_real_one(
    admin: Operator, truth: dict[str, str], name: str
) -> None:
    alias = f"{name}-live"
    assert admin.ask("PUT", f"/aliases/{alias}", {"expert": name}).json() == {
        "object": "alias",
        "alias": alias,
        "expert": name,
    }
    assert admin.get(f"/aliases/{alias}")["expert"] == name
    assert admin.get(f"/experts/{name}")["aliases"] == [alias]
    assert admin.text(model=alias) == (truth["two"], {name: 2})
    assert admin.text(model=f"{alias}@2") == (truth["two"], {name: 2})
    assert admin.text(gates={alias: 1}) == (truth["two"], {name: 2})
    http = admin.served.http
    [model] = [one for one in http.get("/v1/models").json()["data"] if one["id"] == alias]
    assert (model["kind"], model["parent"], model["root"], model["generation"]) == ("alias", name, "tiny", 2)
    chat = admin.served.post(
        "/v1/chat/completions",
        {"model": alias, "messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
    )
    assert chat.json()["routing"]["generations"] == {name: 2}
    assert chat.json()["model"] == alias
    lorax = admin.served.post("/generate", {"inputs": "a", "parameters": {"adapter_id": alias}})
    assert lorax.status_code == 200, lorax.text
    embedded = admin.served.post("/v1/embeddings", {"model": alias, "input": "a"})
    assert embedded.status_code == 200, embedded.text

    admin.ask("PUT", f"/aliases/{alias}", {"expert": "truth-three"})
    assert admin.text(model=alias) == (truth["three"], {"truth-three": 1})
    assert admin.ask("DELETE", f"/aliases/{alias}").json() == {"id": alias, "deleted": True}
    assert admin.ask("DELETE", f"/aliases/{alias}").status_code == 404
    assert admin.served.post("/v1/completions", {"model": alias, "prompt": "a"}).status_code == 404


@pytest.mark.parametrize(
    ("alias", "expert", "status"),
    [
        ("alpha", "beta", 409),
        ("tiny", "alpha", (400, 409)),
        ("shared", "alpha", (400, 409)),
        ("fine", "nobody", 404),
        ("a%40b", "alpha", 400),
        ("%F0%9F%90%8D", "alpha", 400),
        ("-x", "alpha", 400),
        ("x" * 65, "alpha", 400),
        ("fine", "../alpha", 400),
        ("fine", "", 400),
        ("fine", 7, 400),
    ],
)
def test_an_impossible_alias_is_refused(admin: Operator, alias: str, expert: Any, status: Any) -> None:
    answer = admin.ask("PUT", f"/aliases/{alias}", {"expert": expert})
    assert answer.status_code in (status if isinstance(status, tuple) else (status,)), answer.text
    error_of(answer)
    assert admin.ask("GET", f"/aliases/{alias}").status_code == 404


def test_an_experts_name_is_not_given_to_an_alias_nor_an_aliass_to_an_expert(admin: Operator) -> None:
    admin.ask("PUT", "/aliases/taken", {"expert": "alpha"})
    answer = admin.begin(name="taken", path="one")
    assert answer.status_code == 409, answer.text
    admin.ask("DELETE", "/aliases/taken")


def test_a_canary_answers_its_share_of_routed_requests_and_says_so(
    admin: Operator, truth: dict[str, str]
) -> None:
    admin.registered(name="bird", path="one", prompts=PROMPTS)
    tried = admin.register(
        name="bird", path="two", prompts=PROMPTS, replace=True, trial={"kind": "canary", "percent": 40}
    )
    assert tried.status_code == 201, tried.text
    body = tried.json()
    assert (body["generation"], body["new_generation"]) == (1, 2)
    assert body["trial"]["generation"] == 2
    assert body["trial"]["percent"] == 40
    by_number = {1: truth["one"], 2: truth["two"]}
    assert admin.text(model="bird") == (truth["one"], {"bird": 1})
    assert admin.text(model="bird@2") == (truth["two"], {"bird": 2})
    assert "bird@2" in {model["id"] for model in admin.served.http.get("/v1/models").json()["data"]}
    alone = {number: admin.text(model=f"bird@{number}", prompt=PROMPTS[0])[0] for number in by_number}
    seen: dict[int, int] = {1: 0, 2: 0}
    for _ in range(60):
        text, generations = admin.text(prompt=PROMPTS[0], routing={"top_k": 1, "threshold": 0.0})
        assert generations.keys() == {"bird"}
        seen[generations["bird"]] += 1
        assert text == alone[generations["bird"]]
    assert 8 < seen[2] < 42
    ended = admin.ask("DELETE", "/experts/bird/trial")
    assert (ended.status_code, ended.json()["trial"]) == (200, None)
    for _ in range(20):
        assert admin.text(prompt=PROMPTS[0], routing={"top_k": 1})[1] == {"bird": 1}
    assert admin.served.post("/v1/completions", {"model": "bird@2", "prompt": "a"}).status_code == 404


def test_a_shadow_answers_nobody(admin: Operator) -> None:
    admin.registered(name="shade", path="one", prompts=PROMPTS)
    admin.registered(name="shade", path="two", prompts=PROMPTS, replace=True, activate=False)
    shadow = {"generation": 2, "kind": "shadow", "percent": 100}
    answer = admin.ask("PUT", "/experts/shade/trial", shadow)
    assert answer.status_code == 200, answer.text
    assert answer.json()["trial"]["kind"] == "shadow"
    # Shares of trials are beside each other: there is no room for another.
    admin.registered(name="crowd", path="one")
    admin.registered(name="crowd", path="two", replace=True, activate=False)
    crowded = admin.ask("PUT", "/experts/crowd/trial", {"generation": 2, "kind": "canary", "percent": 1})
    assert crowded.status_code == 409
    assert error_of(crowded)["code"] == "wrong_state"
    for prompt in PROMPTS[:10]:
        generations = admin.text(prompt=prompt, max_tokens=1)[1]
        assert generations.get("shade", 1) == 1
    assert admin.ask("DELETE", "/experts/shade/trial").status_code == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"generation": 1, "kind": "canary", "percent": 0}, "percent"),
        ({"generation": 1, "kind": "canary", "percent": 101}, "percent"),
        ({"generation": 1, "kind": "half", "percent": 5}, "kind"),
        ({"generation": 0, "kind": "shadow", "percent": 5}, "generation"),
        ({"generation": "1", "kind": "shadow", "percent": 5}, "generation"),
        ({"kind": "shadow", "percent": 5}, "generation"),
        ({"generation": 1, "kind": "shadow", "percent": 5, "weight": 1}, "weight"),
    ],
)
def test_a_bad_trial_is_refused_by_field(admin: Operator, body: dict[str, Any], param: str) -> None:
    answer = admin.ask("PUT", "/experts/alpha/trial", body)
    assert answer.status_code == 400, answer.text
    assert error_of(answer)["param"] == param


def test_canary_prompts_keep_a_generation_that_answers_otherwise_from_serving(
    admin: Operator, truth: dict[str, str], name: str
) -> None:
    wrong = [{"prompt": "Add 1 and 2.", "expected": "nobody answers this", "match": "exact"}]
    refused = admin.register(name=name, path="three", replace=True, canary_prompts=wrong)
    assert refused.status_code == 422, refused.text
    assert error_of(refused)["code"] == "expert_rejected"
    assert admin.text(model=name) == (truth["two"], {name: 2})
    assert admin.get(f"/experts/{name}/generations/3")["state"] == "failed"
    assert admin.get(f"/experts/{name}/generations/3")["report"]
    lenient = admin.register(
        name=name, path="three", replace=True, canary_prompts=wrong, canary_min_score=0.0
    )
    assert lenient.status_code == 201, lenient.text
    assert admin.text(model=name) == (truth["three"], {name: 4})


def test_of_two_operators_who_build_on_one_generation_one_wins(admin: Operator, name: str) -> None:
    barrier = threading.Barrier(2)
    answers: list[httpx.Response] = []

    def back() -> None:
        with httpx.Client(base_url=admin.served.url, headers=admin.headers, timeout=60) as http:
            barrier.wait()
            body = {"generation": 1, "expected_generation": 2}
            answers.append(http.post(f"/admin/experts/{name}/activate", json=body))

    for _ in range(5):
        answers.clear()
        threads = [threading.Thread(target=back) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(answer.status_code for answer in answers) == [200, 409]
        assert admin.text(model=name)[1] == {name: 1}
        assert admin.post(f"/experts/{name}/activate", {"generation": 2}).status_code == 200


def test_of_registrations_that_race_for_one_generation_one_wins(admin: Operator, name: str) -> None:
    barrier = threading.Barrier(4)
    answers: list[httpx.Response] = []

    def register(path: str) -> None:
        with httpx.Client(base_url=admin.served.url, headers=admin.headers, timeout=60) as http:
            barrier.wait()
            body = {"name": name, "path": path, "expected_generation": 2}
            answers.append(http.post("/admin/experts", json=body, params={"wait": 60}))

    paths = ("one", "two", "three", "one")
    threads = [threading.Thread(target=register, args=(path,)) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answer.status_code for answer in answers) == [201, 409, 409, 409]
    assert admin.text(model=name)[1] == {name: 3}


def test_answers_under_replacement_are_of_the_generations_that_they_name(
    admin: Operator, truth: dict[str, str], name: str
) -> None:
    by_number = {1: truth["one"], 2: truth["two"]}
    done = threading.Event()
    wrong: list[str] = []
    counts = {1: 0, 2: 0}

    def keep_asking() -> None:
        body = {
            "model": name,
            "prompt": "Add 1 and 2.",
            "max_tokens": 16,
            "temperature": 0,
            "ignore_eos": True,
        }
        with httpx.Client(base_url=admin.served.url, timeout=60) as http:
            while not done.is_set():
                answer = http.post("/v1/completions", json=body).json()
                number = answer["routing"]["generations"][name]
                counts[number] += 1
                if answer["choices"][0]["text"] != by_number[number]:
                    wrong.append(f"{number}: {answer['choices'][0]['text']!r}")

    threads = [threading.Thread(target=keep_asking) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for turn in range(20):
            answer = admin.post(f"/experts/{name}/activate", {"generation": 1 + turn % 2})
            assert answer.status_code == 200, answer.text
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not wrong
    assert min(counts.values()) > 0


def test_what_has_only_defaults_needs_no_body(admin: Operator, truth: dict[str, str], name: str) -> None:
    assert admin.post(f"/experts/{name}/pin").json()["pinned"] is True
    assert admin.ask("DELETE", f"/experts/{name}/pin").json()["pinned"] is False
    assert admin.post(f"/experts/{name}/rollback").json()["generation"] == 1
    assert admin.text(model=name) == (truth["one"], {name: 1})
    half = admin.post(f"/experts/{name}/rollback", headers={"Content-Type": "application/json"})
    assert (half.status_code, error_of(half)["code"]) == (400, "invalid_request")


def test_garbage_collection_leaves_what_serves_and_as_many_generations_as_it_is_told(
    admin: Operator, truth: dict[str, str], name: str
) -> None:
    admin.registered(name=name, path="three", expected_generation=2)
    for keep in (0, -1, "all"):
        refused = admin.post("/registry/gc", {"keep": keep})
        assert (refused.status_code, error_of(refused)["param"]) == (400, "keep")
    assert f"{name}@1" not in admin.post("/registry/gc").json()["generations"]
    # Not before every replica has said that it serves what came after.
    assert eventually(lambda: f"{name}@1" in admin.post("/registry/gc", {"keep": 2}).json()["generations"])
    refused = admin.post(f"/experts/{name}/activate", {"generation": 1})
    assert (refused.status_code, error_of(refused)["code"]) == (409, "wrong_state")
    assert admin.post(f"/experts/{name}/activate", {"generation": 2}).status_code == 200
    assert admin.text(model=name) == (truth["two"], {name: 2})


def test_the_registrys_state_tells_revisions_and_replicas(admin: Operator) -> None:
    # A router that was queued to be fitted again may come at any time.
    for state in ("queued", "running"):
        assert eventually(lambda state=state: not admin.get("/jobs", state=state)["data"], 60)
    assert eventually(lambda: (now := admin.get("/registry"))["served_revision"] == now["revision"])
    before = admin.get("/registry")
    assert before["object"] == "registry"
    assert before["writable"] is True
    assert before["replica"] in {one["id"] for one in before["replicas"]}
    assert not before["broken"]
    admin.ask("PUT", "/aliases/moves-on", {"expert": "alpha"})
    after = admin.get("/registry")
    assert after["revision"] == after["served_revision"] > before["revision"]
    admin.ask("DELETE", "/aliases/moves-on")
    [bundle, *_] = admin.get("/bundles")["data"]
    assert (bundle["state"], bundle["build_id"]) == ("active", after["build_id"])
