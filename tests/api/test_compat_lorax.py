"""LoRAX's routes: its own client against them, and the same server's /v1."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import lorax
import pytest
from lorax.errors import NotFoundError, ValidationError

from tests.api.harness import Served, eventually, serving
from tests.fixtures.tiny import TinyFamily

# The client's own ways; nothing of ours is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:The `dict` method is deprecated")

PROMPT = "Add 1 and 2."
LENGTH: dict[str, Any] = {"max_new_tokens": 12, "ignore_eos_token": True}
MIX = {"ids": ["gamma", "alpha"], "weights": [-0.5, 0.75]}
GATES = {"alpha": 0.75, "gamma": -0.5}


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[lorax.Client]:
    made = lorax.Client(server.url, timeout=60)
    yield made
    if made.session is not None:
        made.session.close()


def generate(server: Served, **parameters: Any) -> dict[str, Any]:
    body = {"inputs": PROMPT, "parameters": {**LENGTH, **parameters}}
    answer = server.post("/generate", body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def ours(server: Served, **body: Any) -> dict[str, Any]:
    """The same completion through /v1."""
    options = {"prompt": PROMPT, "temperature": 0, "max_tokens": 12, "ignore_eos": True}
    return server.complete(**{**options, **body})


def events(server: Served, path: str = "/generate_stream", **parameters: Any) -> list[dict[str, Any]]:
    body = {"inputs": PROMPT, "parameters": {**LENGTH, **parameters}}
    return [json.loads(event) for event in server.events(path, body)]


def refusal(answer: httpx.Response) -> dict[str, str]:
    """The error in LoRAX's shape."""
    body = dict(answer.json())
    assert body.keys() == {"error", "error_type"}
    assert all(isinstance(value, str) and value for value in body.values())
    return body


@pytest.mark.parametrize(
    ("adapter", "model"), [("alpha", "alpha"), ("beta", "beta"), (None, "tiny"), ("__base_model__", "shared")]
)
def test_an_adapter_is_an_expert_and_none_is_the_router(
    server: Served, client: lorax.Client, adapter: str | None, model: str
) -> None:
    expected = ours(server, model=model)
    answer = client.generate(PROMPT, adapter_id=adapter, **LENGTH)
    assert answer.generated_text == expected["choices"][0]["text"]
    assert answer.details is not None
    assert answer.details.finish_reason == "length"
    assert answer.details.prompt_tokens == expected["usage"]["prompt_tokens"]
    assert answer.details.generated_tokens == len(answer.details.tokens) == 12
    assert generate(server, adapter_id=adapter)["routing"] == expected["routing"]


def test_merged_adapters_are_exactly_the_gates(server: Served, client: lorax.Client) -> None:
    merged = lorax.MergedAdapters(**MIX, density=0.5, merge_strategy="linear")
    expected = ours(server, gates=GATES)
    assert (
        client.generate(PROMPT, merged_adapters=merged, **LENGTH).generated_text
        == (expected["choices"][0]["text"])
    )
    answer = generate(server, merged_adapters=MIX)
    assert answer["routing"] == expected["routing"]
    assert answer["routing"]["gates"] == GATES
    assert "details" not in answer


def test_metrics_know_whose_answer_it_was(server: Served) -> None:
    def counted() -> float:
        labels = 'gen_ai_operation_name="text_completion",gen_ai_provider_name="twinserve"'
        name = "gen_ai_server_request_duration_seconds_count"
        try:
            return server.metric(f'{name}{{error_type="",{labels},gen_ai_request_model="beta"}}')
        except AssertionError:
            return 0

    before = counted()
    generate(server, adapter_id="beta")
    assert eventually(lambda: counted() == before + 1)


def test_the_router_takes_its_options(server: Served) -> None:
    assert list(generate(server, routing={"top_k": 1})["routing"]["gates"]) == ["alpha"]


def test_a_stream_says_what_the_plain_answer_says(server: Served, client: lorax.Client) -> None:
    plain = client.generate(PROMPT, adapter_id="beta", **LENGTH)
    streamed = list(client.generate_stream(PROMPT, adapter_id="beta", **LENGTH))
    assert plain.details is not None
    assert [event.token for event in streamed] == plain.details.tokens
    assert "".join(event.token.text for event in streamed if not event.token.special) == plain.generated_text
    assert all(event.generated_text is None and event.details is None for event in streamed[:-1])
    last = streamed[-1]
    assert last.generated_text == plain.generated_text
    assert last.details is not None
    assert last.details.model_dump() == {
        name: value for name, value in plain.details.model_dump().items() if name in last.details.model_dump()
    }


def test_the_last_event_of_a_stream_carries_the_routing(server: Served) -> None:
    streamed = events(server, details=True, merged_adapters=MIX)
    assert len(streamed) == 12
    assert all("routing" not in event for event in streamed[:-1])
    assert streamed[-1]["routing"]["gates"] == GATES
    without = events(server)
    assert (without[-1]["details"], without[0]["generated_text"]) == (None, None)


def test_tokens_have_the_scores_of_v1(server: Served) -> None:
    tokens = generate(server, details=True, return_k_alternatives=2)["details"]["tokens"]
    scores = ours(server, logprobs=2)["choices"][0]["logprobs"]
    assert [token["logprob"] for token in tokens] == scores["token_logprobs"]
    assert all(len(token["alternative_tokens"]) == 2 for token in tokens)
    assert all(token["alternative_tokens"][0]["id"] == token["id"] for token in tokens)
    assert "alternative_tokens" not in generate(server, details=True)["details"]["tokens"][0]


def test_the_prompt_is_told_with_its_scores(server: Served, client: lorax.Client) -> None:
    answer = client.generate(PROMPT, decoder_input_details=True, **LENGTH)
    assert answer.details is not None
    prefill = answer.details.prefill
    assert [token.id for token in prefill] == server.runtime.tokenizer.encode(PROMPT)
    assert prefill[0].logprob is None
    echoed = ours(server, echo=True, logprobs=0)["choices"][0]["logprobs"]["token_logprobs"]
    assert [token.logprob for token in prefill] == echoed[: len(prefill)]


def test_a_stop_sequence_ends_the_text_and_is_its_end(server: Served, client: lorax.Client) -> None:
    whole = client.generate(PROMPT, **LENGTH).generated_text
    stop = whole[len(whole) // 2]
    answer = client.generate(PROMPT, stop_sequences=[stop], **LENGTH)
    assert answer.generated_text == whole[: whole.index(stop) + 1]
    assert answer.details is not None
    assert answer.details.finish_reason == "stop_sequence"
    streamed = list(client.generate_stream(PROMPT, stop_sequences=[stop], **LENGTH))
    assert streamed[-1].generated_text == answer.generated_text


def test_the_end_of_sequence_is_a_special_token_outside_the_text(server: Served) -> None:
    ended = False
    for seed in range(400):
        body = {
            "max_new_tokens": 60,
            "ignore_eos_token": False,
            "do_sample": True,
            "seed": seed,
            "details": True,
        }
        answer = generate(server, temperature=1.9, **body)
        details = answer["details"]
        if details["finish_reason"] == "eos_token":
            *_, last = details["tokens"]
            assert (last["id"], last["special"]) == (server.runtime.tokenizer.eos_token_id, True)
            assert details["generated_tokens"] == len(details["tokens"])
            assert answer["generated_text"] == "".join(
                token["text"] for token in details["tokens"] if not token["special"]
            )
            streamed = events(server, temperature=1.9, **body)
            assert [event["token"] for event in streamed] == details["tokens"]
            ended = True
            break
    assert ended


def test_nothing_is_sampled_unless_asked_and_the_seed_told_gives_it_again(server: Served) -> None:
    greedy = generate(server, details=True)
    assert greedy["generated_text"] == ours(server)["choices"][0]["text"]
    assert greedy["details"]["seed"] is None
    assert generate(server, do_sample=True, temperature=0.0)["generated_text"] == greedy["generated_text"]
    drawn = generate(server, do_sample=True, details=True)
    seed = drawn["details"]["seed"]
    assert generate(server, do_sample=True, seed=seed)["generated_text"] == drawn["generated_text"]
    largest = generate(server, do_sample=True, seed=2**64 - 1, details=True)
    assert largest["details"]["seed"] == 2**64 - 1


def test_the_best_of_several_is_the_likeliest_on_average(server: Served) -> None:
    answer = generate(server, best_of=4, do_sample=True, details=True)
    details = answer["details"]
    choices = [{**details, "generated_text": answer["generated_text"]}, *details["best_of_sequences"]]
    assert len({choice["generated_text"] for choice in choices}) == 4
    means = [
        sum(token["logprob"] for token in choice["tokens"]) / len(choice["tokens"]) for choice in choices
    ]
    assert means == sorted(means, reverse=True)
    for choice in choices:
        again = generate(server, do_sample=True, seed=choice["seed"])
        assert again["generated_text"] == choice["generated_text"]


def test_a_response_format_shapes_the_answer(server: Served, client: lorax.Client) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    answer = client.generate(
        PROMPT, response_format={"type": "json_object", "schema": schema}, max_new_tokens=200
    )
    assert json.loads(answer.generated_text)["a"] in (1, 2)


def test_the_whole_text_and_the_end_of_a_long_prompt(server: Served) -> None:
    answer = generate(server, return_full_text=True)
    assert answer["generated_text"] == PROMPT + ours(server)["choices"][0]["text"]
    cut = generate(server, truncate=4, details=True)
    ids = server.runtime.tokenizer.encode(PROMPT)[-4:]
    assert cut["details"]["prompt_tokens"] == 4
    assert cut["generated_text"] == ours(server, prompt=ids)["choices"][0]["text"]


def test_without_max_new_tokens_the_context_is_filled(server: Served) -> None:
    answer = server.post(
        "/generate", {"inputs": PROMPT, "parameters": {"ignore_eos_token": True, "details": True}}
    ).json()
    details = answer["details"]
    assert details["prompt_tokens"] + details["generated_tokens"] == server.runtime.max_context


def test_the_route_of_the_clients_answers_both_ways(server: Served) -> None:
    body = {"inputs": PROMPT, "parameters": {**LENGTH, "adapter_id": "alpha"}}
    [plain] = server.post("/", {**body, "stream": False}).json()
    assert plain["generated_text"] == ours(server, model="alpha")["choices"][0]["text"]
    assert events(server, "/", adapter_id="alpha")[-1]["generated_text"] == plain["generated_text"]


def test_info_tells_the_limits(server: Served) -> None:
    told = server.http.get("/info").json()
    assert told["model_id"] == "tiny"
    assert told["max_total_tokens"] == server.runtime.max_context
    assert told["max_input_length"] == server.runtime.max_context - 1


def test_neutral_values_of_unsupported_parameters_are_accepted(server: Served) -> None:
    generate(
        server, watermark=False, typical_p=None, adapter_source="local", api_token=None, response_format=None
    )


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"merged_adapters": {**MIX, "merge_strategy": "ties"}}, "merge_strategy"),
        ({"merged_adapters": {**MIX, "merge_strategy": "dare_linear"}}, "merge_strategy"),
        ({"merged_adapters": {"ids": ["alpha"], "weights": [1.0, 2.0]}}, "weights"),
        ({"merged_adapters": {"ids": ["alpha", "alpha"], "weights": [1.0, 2.0]}}, "ids"),
        ({"merged_adapters": {"ids": [], "weights": []}}, "ids"),
        ({"merged_adapters": {"ids": ["nobody"], "weights": [1.0]}}, "ids[0]"),
        ({"merged_adapters": {"ids": ["alpha"], "weights": [9.0]}}, "weights[0]"),
        ({"merged_adapters": MIX, "adapter_id": "alpha"}, "adapter_id"),
        ({"adapter_id": "alpha", "routing": {"top_k": 1}}, "routing"),
        ({"adapter_id": ""}, "adapter_id"),
        ({"adapter_source": "hub"}, "adapter_source"),
        ({"api_token": "x"}, "api_token"),
        ({"typical_p": 0.5}, "typical_p"),
        ({"watermark": True}, "watermark"),
        ({"best_of": 2}, "best_of"),
        ({"best_of": 2, "do_sample": True, "seed": 1}, "best_of"),
        ({"best_of": 17, "do_sample": True}, "parameters.best_of"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 5000}, "parameters.max_new_tokens"),
        ({"max_new_tokens": 256}, "parameters.max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 1.5}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"truncate": 0}, "truncate"),
        ({"truncate": 100_000}, "parameters.truncate"),
        ({"stop": ["x"] * 9}, "parameters.stop"),
        ({"stop": [""]}, "stop"),
        ({"return_k_alternatives": 21, "details": True}, "parameters.return_k_alternatives"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"n": 2}, "n"),
    ],
)
def test_a_bad_parameter_is_refused_by_name_in_loraxs_shape(
    server: Served, parameters: dict[str, Any], named: str
) -> None:
    answer = server.post("/generate", {"inputs": PROMPT, "parameters": {**LENGTH, **parameters}})
    assert answer.status_code == 422, answer.text
    error = refusal(answer)
    assert error["error_type"] == "validation"
    assert named in error["error"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"inputs": ""}, 422),
        ({"inputs": 5}, 422),
        ({"inputs": "a" * 5000}, 422),
        ({}, 422),
        ({"inputs": "a", "stream": True}, 422),
        ({"inputs": "a", "parameters": {"adapter_id": "nobody"}}, 404),
        ({"inputs": "a", "parameters": {"timeout": 1e-6}}, 504),
    ],
)
def test_a_bad_request_is_refused_in_loraxs_shape(server: Served, body: dict[str, Any], status: int) -> None:
    answer = server.post("/generate", body)
    assert answer.status_code == status, answer.text
    refusal(answer)


@pytest.mark.parametrize("path", ["/generate_stream", "/"])
@pytest.mark.parametrize("field", [{"best_of": 2, "do_sample": True}, {"decoder_input_details": True}])
def test_what_no_stream_can_carry_is_refused_before_it_begins(
    server: Served, path: str, field: dict[str, Any]
) -> None:
    answer = server.post(path, {"inputs": PROMPT, "parameters": field, "stream": True})
    assert answer.status_code == 422
    assert next(iter(field)) in refusal(answer)["error"]


def test_the_client_raises_its_own_errors(client: lorax.Client) -> None:
    with pytest.raises(NotFoundError, match="nobody"):
        client.generate(PROMPT, adapter_id="nobody")
    ties = lorax.MergedAdapters(**MIX, density=0.5, merge_strategy="ties")
    with pytest.raises(ValidationError, match="merge_strategy"):
        client.generate(PROMPT, merged_adapters=ties)
    with pytest.raises(ValidationError, match="stop"):
        list(client.generate_stream(PROMPT, stop_sequences=["x"] * 9))


def test_a_full_queue_is_overloaded(family: TinyFamily) -> None:
    body = {"inputs": "a", "parameters": {"max_new_tokens": 200, "ignore_eos_token": True}}
    with serving(family.bundle, max_batch=1, max_queue=1) as served:

        async def together() -> list[httpx.Response]:
            async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
                return list(await asyncio.gather(*(client.post("/generate", json=body) for _ in range(20))))

        answers = asyncio.run(together())
    refused = [answer for answer in answers if answer.status_code != 200]
    assert refused
    for answer in refused:
        assert answer.status_code == 429
        assert refusal(answer)["error_type"] == "overloaded"
        assert int(answer.headers["retry-after"]) >= 1


def test_what_fails_in_a_stream_is_its_last_event_in_loraxs_shape(family: TinyFamily) -> None:
    # One sequence at a time: the stream waits behind another one, begins for its keep-alive's sake, and is too late.
    with serving(family.bundle, max_batch=1, keepalive_seconds=0.05) as served:
        long = {
            "model": "tiny",
            "prompt": "a",
            "n": 16,
            "max_tokens": 240,
            "ignore_eos": True,
            "stream": True,
        }
        with served.http.stream("POST", "/v1/completions", json=long) as running:
            lines = running.iter_lines()
            next(lines)
            [last] = events(served, timeout=0.2)
    assert last.keys() == {"error", "error_type"}
    assert last["error_type"] == "deadline_exceeded"


def test_hanging_up_on_a_stream_frees_its_row(server: Served) -> None:
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 200, "ignore_eos_token": True}}
    with server.http.stream("POST", "/generate_stream", json=body) as answer:
        next(answer.iter_lines())
    assert eventually(lambda: server.runtime.gauges().running == server.runtime.gauges().kv_blocks_used == 0)
    assert all(status.leases == 0 for status in server.runtime.experts())
