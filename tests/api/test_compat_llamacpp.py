"""llama.cpp's routes and its field `lora`, against the same server's own."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.harness import ADMIN_KEY, Served, error_of, eventually, serving
from tests.fixtures.tiny import TinyFamily, tiny_lora

ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}
PROMPT = "Add 1 and 2."
GREEDY: dict[str, Any] = {"prompt": PROMPT, "temperature": 0, "n_predict": 12, "ignore_eos": True}
MIX = [{"id": 0, "scale": 0.75}, {"id": 2, "scale": -0.5}]
GATES = {"alpha": 0.75, "gamma": -0.5}


def complete(server: Served, **body: Any) -> dict[str, Any]:
    answer = server.post("/completion", {**GREEDY, **body})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def ours(server: Served, **body: Any) -> dict[str, Any]:
    """The same completion through /v1."""
    options = {"prompt": PROMPT, "temperature": 0, "max_tokens": 12, "ignore_eos": True}
    return server.complete(**{**options, **body})


def pieces(server: Served, **body: Any) -> list[dict[str, Any]]:
    return [json.loads(event) for event in server.events("/completion", {**GREEDY, **body})]


def refusal(answer: httpx.Response) -> dict[str, Any]:
    """The error object in llama.cpp's shape."""
    body = answer.json()
    assert body.keys() == {"error"}
    error = dict(body["error"])
    assert error.keys() == {"code", "message", "type", "param"}
    assert error["code"] == answer.status_code
    assert error["message"]
    return error


def test_adapters_have_numbers_in_the_order_of_their_names(server: Served) -> None:
    listed = server.http.get("/lora-adapters").json()
    assert [(one["id"], one["path"], one["scale"]) for one in listed] == [
        (0, "alpha", 0.0),
        (1, "beta", 0.0),
        (2, "gamma", 0.0),
    ]
    assert {one["chosen_by"] for one in listed} == {"router"}
    assert {one["generation"] for one in listed} == {1}


def test_the_field_lora_of_v1_is_gates_by_number(server: Served) -> None:
    by_number = ours(server, lora=MIX)
    by_name = ours(server, gates=GATES)
    assert by_number["choices"] == by_name["choices"]
    assert by_number["routing"] == by_name["routing"]
    assert by_number["routing"]["gates"] == GATES


def test_the_field_lora_works_in_chats_and_streams(server: Served) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Add 1 and 2."}], "temperature": 0}
    chat = server.post("/v1/chat/completions", {**body, "max_tokens": 4, "lora": MIX}).json()
    assert chat["routing"]["gates"] == GATES
    chunks = server.chunks(
        "/v1/completions", {"model": "tiny", "prompt": PROMPT, "max_tokens": 4, "lora": MIX}
    )
    assert chunks[-1]["routing"]["gates"] == GATES


def test_an_empty_list_leaves_v1_to_the_router_and_a_scale_of_zero_is_none(server: Served) -> None:
    assert ours(server, lora=[])["routing"]["gates"] == {"alpha": 1.0}
    assert ours(server, lora=[{"id": 1, "scale": 0}])["routing"]["gates"] == {}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"lora": [{"id": 9, "scale": 1}]}, "lora[0].id"),
        ({"lora": [{"id": -1, "scale": 1}]}, "lora[0].id"),
        ({"lora": [{"id": 0, "scale": 1}, {"id": 0, "scale": 2}]}, "lora[1].id"),
        ({"lora": [{"id": 0, "scale": 9}]}, "lora[0].scale"),
        ({"lora": [{"id": 0, "scale": "1"}]}, "lora[0].scale"),
        ({"lora": [{"id": 0}]}, "lora[0].scale"),
        ({"lora": [{"id": 0, "scale": 1, "name": "x"}]}, "lora[0].name"),
        ({"lora": {"0": 1}}, "lora"),
        ({"lora": MIX, "gates": GATES}, "lora"),
        ({"lora": MIX, "routing": {"top_k": 1}}, "lora"),
        ({"lora": MIX, "model": "alpha"}, "lora"),
        ({"lora": MIX, "model": "nobody"}, "model"),
    ],
)
def test_bad_scales_of_v1_are_refused_by_field(server: Served, change: dict[str, Any], param: str) -> None:
    answer = server.post("/v1/completions", {"model": "tiny", "prompt": "a", **change})
    assert answer.status_code == (404 if param == "model" else 400), answer.text
    assert error_of(answer)["param"] == param


def test_a_completion_says_what_v1_says_in_llama_cpps_words(server: Served) -> None:
    answer, same = complete(server, return_tokens=True), ours(server)
    assert answer["content"] == same["choices"][0]["text"]
    assert answer["routing"] == same["routing"]
    assert answer["tokens_predicted"] == same["usage"]["completion_tokens"] == len(answer["tokens"])
    assert answer["tokens_evaluated"] == same["usage"]["prompt_tokens"]
    assert answer["tokens"] == ours(server, return_token_ids=True)["choices"][0]["token_ids"]
    assert (answer["stop"], answer["stop_type"], answer["stopping_word"]) == (True, "limit", "")
    assert (answer["index"], answer["id_slot"], answer["truncated"]) == (0, -1, False)
    assert (answer["model"], answer["prompt"]) == ("tiny", PROMPT)
    assert answer["has_new_line"] == ("\n" in answer["content"])
    assert answer["timings"]["predicted_n"] == 12
    assert answer["timings"]["cache_n"] + answer["timings"]["prompt_n"] == answer["tokens_evaluated"]
    assert answer["timings"]["prompt_ms"] > 0
    assert "completion_probabilities" not in answer


def test_completions_without_v1_are_the_same_route(server: Served) -> None:
    assert server.post("/completions", GREEDY).json()["content"] == complete(server)["content"]


@pytest.mark.parametrize(
    ("change", "gates"),
    [
        ({"lora": MIX}, GATES),
        ({"gates": {"beta": 0.5}}, {"beta": 0.5}),
        ({"model": "beta"}, {"beta": 1.0}),
        ({"model": "shared"}, {}),
        ({"routing": {"top_k": 1}}, {"alpha": 1.0}),
        ({}, {"alpha": 1.0}),
    ],
)
def test_who_answers_a_completion(server: Served, change: dict[str, Any], gates: dict[str, float]) -> None:
    assert complete(server, **change)["routing"]["gates"] == gates


def test_a_prompt_may_be_text_ids_or_both(server: Served) -> None:
    ids = server.runtime.tokenizer.encode(PROMPT)
    expected = complete(server)["content"]
    assert complete(server, prompt=ids)["content"] == expected
    mixed = complete(server, prompt=[*ids[:-2], server.runtime.tokenizer.decode(ids[-2:])])
    assert mixed["content"] == expected
    assert mixed["prompt"] == PROMPT


def test_several_prompts_and_choices_come_as_a_list(server: Served) -> None:
    ids = server.runtime.tokenizer.encode(PROMPT)
    both = server.post("/completion", {**GREEDY, "prompt": ["SORT: river zebra river apple", ids]}).json()
    assert [one["index"] for one in both] == [0, 1]
    assert both[1]["content"] == complete(server)["content"]
    assert both[0]["routing"]["gates"] == {"gamma": 1.0}
    choices = server.post("/completion", {**GREEDY, "n_cmpl": 3, "temperature": 1, "seed": 5}).json()
    assert len({one["content"] for one in choices}) == 3


def test_the_seed_that_an_answer_tells_gives_it_again(server: Served) -> None:
    drawn = complete(server, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
    seed = drawn["generation_settings"]["seed"]
    again = complete(server, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=seed)
    assert again["content"] == drawn["content"]
    other = complete(server, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=4294967295)
    assert other["generation_settings"]["seed"] != seed


def test_how_a_completion_ended(server: Served) -> None:
    whole = complete(server)["content"]
    stop = whole[len(whole) // 2]
    word = complete(server, stop=[stop])
    assert (word["stop_type"], word["stopping_word"]) == ("word", stop)
    assert word["content"] == whole[: whole.index(stop)]
    eos = server.runtime.tokenizer.eos_token_id
    ended = complete(server, ignore_eos=False, logit_bias=[[eos, 100]], return_tokens=True)
    assert (ended["stop_type"], ended["content"], ended["tokens"]) == ("eos", "", [eos])


def test_without_n_predict_a_completion_fills_the_context(server: Served) -> None:
    answer = server.post("/completion", {"prompt": PROMPT, "temperature": 0, "ignore_eos": True}).json()
    assert answer["tokens_evaluated"] + answer["tokens_predicted"] == server.runtime.max_context
    assert answer["stop_type"] == "limit"


def test_n_predict_zero_only_computes_the_prompt(server: Served) -> None:
    prompt = "one two three name the opposite of the word " * 3
    answer = complete(server, prompt=prompt, n_predict=0, return_tokens=True)
    assert (answer["content"], answer["tokens"], answer["tokens_predicted"]) == ("", [], 0)
    assert answer["stop_type"] == "limit"
    assert complete(server, prompt=prompt)["tokens_cached"] > 0
    assert [piece["stop"] for piece in pieces(server, prompt=prompt, n_predict=0)] == [True]


def test_a_stream_adds_up_to_the_plain_answer_and_ends_with_stop(server: Served) -> None:
    plain = complete(server, return_tokens=True, stop=["zzz"])
    streamed = pieces(server, stop=["zzz"])
    *parts, last = streamed
    assert "".join(part["content"] for part in parts) == plain["content"]
    assert [token for part in parts for token in part["tokens"]] == plain["tokens"]
    assert [part["tokens_predicted"] for part in parts if part["tokens"]] == list(range(1, 13))
    assert not any(part["stop"] for part in parts)
    assert (last["stop"], last["content"], last["tokens"]) == (True, "", [])
    assert last["stop_type"] == plain["stop_type"]
    assert last["tokens_predicted"] == 12
    assert last["routing"] == plain["routing"]


def test_a_stream_of_several_prompts_tells_them_apart(server: Served) -> None:
    prompts = [PROMPT, "SORT: river zebra river apple"]
    plain = server.post("/completion", {**GREEDY, "prompt": prompts}).json()
    streamed = pieces(server, prompt=prompts)
    for index in (0, 1):
        text = "".join(part["content"] for part in streamed if part["index"] == index)
        assert text == plain[index]["content"]
    assert sum(part["stop"] for part in streamed) == 2


def test_probabilities_are_those_of_v1(server: Served) -> None:
    told = complete(server, n_probs=3)["completion_probabilities"]
    scores = ours(server, logprobs=3)["choices"][0]["logprobs"]
    assert [one["logprob"] for one in told] == scores["token_logprobs"]
    assert all(len(one["top_logprobs"]) == 3 for one in told)
    assert all(bytes(one["bytes"]).decode(errors="ignore") == one["token"] for one in told)
    streamed = [one for part in pieces(server, n_probs=3) for one in part.get("completion_probabilities", [])]
    assert streamed == told


def test_a_bias_of_false_bans_a_token_in_every_form(server: Served) -> None:
    first = complete(server, return_tokens=True)["tokens"][0]
    text = server.runtime.tokenizer.decode([first])
    assert server.runtime.tokenizer.encode(text, add_special_tokens=False) == [first]
    for form in ([[first, False]], [[text, False]], {str(first): False}):
        assert complete(server, logit_bias=form, return_tokens=True)["tokens"][0] != first
    for form in ([[first, 100]], [[text, 100]], {str(first): 100}):
        assert set(complete(server, logit_bias=form, return_tokens=True)["tokens"]) == {first}


@pytest.mark.parametrize(
    "form", [{"grammar": 'root ::= "yes" | "no"'}, {"json_schema": {"enum": ["yes", "no"]}}]
)
def test_a_grammar_or_schema_shapes_the_answer(server: Served, form: dict[str, Any]) -> None:
    answer = complete(server, n_predict=20, **form)
    assert answer["content"].strip('"') in ("yes", "no")
    assert answer["stop_type"] == "eos"


def test_an_empty_schema_is_any_object(server: Served) -> None:
    answer = complete(server, n_predict=4, json_schema={})
    assert answer["content"].lstrip().startswith("{")


def test_props_tell_defaults_and_limits(server: Served) -> None:
    told = server.http.get("/props").json()
    assert told["default_generation_settings"]["n_ctx"] == server.runtime.max_context
    assert told["default_generation_settings"]["params"]["temperature"] == 0.8
    assert told["chat_template"] == server.runtime.tokenizer.chat_template
    assert told["total_slots"] >= 1


def test_samplers_that_ask_for_nothing_are_accepted(server: Served) -> None:
    complete(
        server,
        typical_p=1.0,
        mirostat=0,
        mirostat_tau=5.0,
        dry_multiplier=0.0,
        xtc_probability=0,
        repeat_last_n=64,
        id_slot=-1,
        n_keep=0,
        cache_prompt=True,
        samplers=["penalties", "temperature", "min_p", "top_k", "top_p"],
        grammar="",
    )


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": {"prompt_string": "a", "multimodal_data": ["eA=="]}}, "prompt"),
        ({"prompt": [{"prompt_string": "a", "multimodal_data": ["eA=="]}]}, "prompt.prompt_string"),
        ({"prompt": [10**9]}, "prompt"),
        ({"prompt": "a" * 5000}, "prompt"),
        ({"n_predict": -2}, "n_predict"),
        ({"n_predict": 100_000}, "n_predict"),
        ({"n_predict": 256}, "n_predict"),
        ({"n_predict": "12"}, "n_predict"),
        ({"n_cmpl": 0}, "n_cmpl"),
        ({"n_cmpl": 1000}, "n_cmpl"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"repeat_penalty": 0}, "repeat_penalty"),
        ({"repeat_penalty": 1.1, "repeat_last_n": 64}, "repeat_last_n"),
        ({"n_probs": 21}, "n_probs"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 9}, "stop"),
        ({"seed": -2}, "seed"),
        ({"logit_bias": [[1, True]]}, "logit_bias"),
        ({"logit_bias": [[1, 101]]}, "logit_bias"),
        ({"logit_bias": [[320, 1]]}, "logit_bias"),
        ({"logit_bias": [["", 1]]}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": [[1, 1]] * 1025}, "logit_bias"),
        ({"mirostat": 2}, "mirostat"),
        ({"samplers": ["top_k", "temperature"]}, "samplers"),
        ({"cache_prompt": False}, "cache_prompt"),
        ({"id_slot": 3}, "id_slot"),
        ({"lora": [{"id": 7, "scale": 1}]}, "lora[0].id"),
        ({"lora": MIX, "gates": GATES}, "lora"),
        ({"gates": {"nobody": 1}}, "gates.nobody"),
        ({"model": "nobody"}, "model"),
        ({"json_schema": {}, "grammar": 'root ::= "a"'}, "grammar"),
        ({"grammar": "root ::= ("}, "grammar"),
        ({"json_schema": {"type": "nothing"}}, "json_schema"),
        ({"max_tokens": 5}, "max_tokens"),
    ],
)
def test_a_bad_completion_is_refused_by_field_in_llama_cpps_shape(
    server: Served, change: dict[str, Any], param: str
) -> None:
    answer = server.post("/completion", {**GREEDY, **change})
    assert answer.status_code == (404 if change.get("model") else 400), answer.text
    assert refusal(answer)["param"] == param


def test_a_body_that_is_no_json_is_refused_in_llama_cpps_shape(server: Served) -> None:
    broken = server.http.post("/completion", content=b"{", headers={"Content-Type": "application/json"})
    assert broken.status_code == 400
    assert "JSON" in refusal(broken)["message"]
    plain = server.http.post("/completion", content=b"a", headers={"Content-Type": "text/plain"})
    assert plain.status_code == 415
    refusal(plain)


def test_a_missed_deadline_is_504_in_llama_cpps_shape(server: Served) -> None:
    late = server.post("/completion", {**GREEDY, "timeout": 1e-6})
    assert late.status_code == 504
    assert refusal(late)["type"] == "server_error"


def test_what_fails_in_a_stream_is_its_last_event_in_llama_cpps_shape(family: TinyFamily) -> None:
    # One sequence at a time: the stream waits behind another one, begins for its keep-alive's sake, and is too late.
    with serving(family.bundle, max_batch=1, keepalive_seconds=0.05) as served:
        long = {**GREEDY, "n_cmpl": 16, "n_predict": 240, "stream": True}
        with served.http.stream("POST", "/completion", json=long) as running:
            lines = running.iter_lines()
            next(lines)
            [last] = pieces(served, timeout=0.2)
    assert last["error"].keys() == {"code", "message", "type", "param"}
    assert last["error"]["code"] == 504


def test_hanging_up_on_a_stream_frees_its_rows(server: Served) -> None:
    body = {**GREEDY, "n_predict": 200, "n_cmpl": 8, "temperature": 1, "stream": True}
    with server.http.stream("POST", "/completion", json=body) as answer:
        next(answer.iter_lines())
    assert eventually(lambda: server.runtime.gauges().running == server.runtime.gauges().kv_blocks_used == 0)
    assert all(status.leases == 0 for status in server.runtime.experts())


@pytest.fixture(scope="module")
def own(family: TinyFamily, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server whose scales and experts these tests change."""
    root = tmp_path_factory.mktemp("root")
    tiny_lora(root / "lora", family.base, rank=4, seed=91)
    bundle = tmp_path_factory.mktemp("own") / "bundle"
    shutil.copytree(family.bundle, bundle)
    with serving(bundle, admin_key=ADMIN_KEY, experts_root=root) as served:
        yield served


def set_scales(server: Served, scales: Any) -> httpx.Response:
    return server.post("/lora-adapters", scales, headers=ADMIN)


def test_default_scales_answer_llama_cpps_requests_and_leave_v1_alone(own: Served) -> None:
    assert set_scales(own, MIX).json() == {"success": True}
    try:
        listed = own.http.get("/lora-adapters").json()
        assert [one["scale"] for one in listed] == [0.75, 0.0, -0.5]
        assert {one["chosen_by"] for one in listed} == {"scales"}
        answer = complete(own)
        assert answer["routing"]["gates"] == GATES
        assert answer["generation_settings"]["lora"] == MIX
        assert complete(own, lora=[{"id": 1, "scale": 1}])["routing"]["gates"] == {"beta": 1.0}
        assert complete(own, model="beta")["routing"]["gates"] == {"beta": 1.0}
        assert ours(own)["routing"]["gates"] == {"alpha": 1.0}
        assert set_scales(own, []).status_code == 200
        assert complete(own)["routing"]["gates"] == {}
    finally:
        assert own.http.delete("/lora-adapters", headers=ADMIN).json() == {"success": True}
    assert complete(own)["routing"]["router_generation"] == 1


def test_refused_scales_change_nothing(own: Served) -> None:
    set_scales(own, MIX)
    try:
        for scales, param in (
            ([{"id": 1, "scale": 0.5}, {"id": 9, "scale": 1}], "[1].id"),
            ([{"id": 1, "scale": 100}], "[0].scale"),
            ([{"id": 1}], "[0].scale"),
            ({"id": 1, "scale": 1}, None),
        ):
            answer = set_scales(own, scales)
            assert answer.status_code == 400, answer.text
            assert refusal(answer)["param"] == param
        assert complete(own)["routing"]["gates"] == GATES
    finally:
        own.http.delete("/lora-adapters", headers=ADMIN)


@pytest.mark.parametrize("method", ["POST", "DELETE"])
def test_default_scales_need_the_admin_key_and_reading_them_does_not(own: Served, method: str) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        answer = own.http.request(method, "/lora-adapters", json=MIX, headers=headers)
        assert answer.status_code == 401
    assert own.http.get("/lora-adapters").json()[0]["chosen_by"] == "router"


def test_numbers_stay_when_experts_come_and_go(own: Served) -> None:
    def numbers() -> dict[str, int]:
        return {one["path"]: one["id"] for one in own.http.get("/lora-adapters").json()}

    def register(name: str) -> None:
        body = {"name": name, "path": "lora"}
        assert own.post("/admin/experts?wait=60", body, headers=ADMIN).status_code == 201

    def retire(name: str) -> None:
        assert own.http.delete(f"/admin/experts/{name}", headers=ADMIN).status_code == 200

    register("aaa")
    assert numbers() == {"alpha": 0, "beta": 1, "gamma": 2, "aaa": 3}
    set_scales(own, [{"id": 3, "scale": 1.0}])
    try:
        retire("aaa")
        assert numbers() == {"alpha": 0, "beta": 1, "gamma": 2}
        gone = own.post("/completion", GREEDY)
        assert gone.status_code == 400
        assert refusal(gone)["param"] == "lora"
        assert "aaa" in refusal(gone)["message"]
        assert complete(own, lora=[{"id": 1, "scale": 1}])["routing"]["gates"] == {"beta": 1.0}
    finally:
        own.http.delete("/lora-adapters", headers=ADMIN)
    register("bbb")
    assert numbers() == {"alpha": 0, "beta": 1, "gamma": 2, "bbb": 4}
    retire("bbb")
    register("aaa")
    assert numbers()["aaa"] == 3
    retire("aaa")


def test_a_client_may_forbid_the_prefix_cache_where_there_is_none(family: TinyFamily, tmp_path: Path) -> None:
    with serving(family.bundle, prefix_cache=False) as served:
        assert complete(served, cache_prompt=False)["tokens_cached"] == 0
