import asyncio
from typing import Any

import openai
import pytest

from tests.api.harness import Served, counts

PROMPT = "Add 1 and 2."


def test_an_openai_client_gets_a_completion_with_usage_and_routing(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=6, temperature=0)
    assert answer.object == "text_completion"
    assert answer.model == "tiny"
    [choice] = answer.choices
    assert choice.text
    assert choice.finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    routing = answer.model_dump()["routing"]
    assert routing["gates"] == {"alpha": 1.0}
    assert routing["generations"] == {"alpha": 1}
    assert routing["pattern"] == "alpha@1:1"
    assert routing["mode"] == "factored"
    assert routing["router_generation"] == 1
    assert 0.5 < routing["confidence"] <= 1


def test_a_completion_without_max_tokens_has_sixteen(server: Served) -> None:
    answer = server.complete(ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 16
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("model", "gates"), [("alpha", {"alpha": 1.0}), ("beta", {"beta": 1.0}), ("shared", {})]
)
def test_a_model_name_chooses_the_gates(server: Served, model: str, gates: dict[str, float]) -> None:
    routing = server.complete(model=model, max_tokens=2)["routing"]
    assert routing["gates"] == gates
    assert routing["router_generation"] is None
    assert routing["confidence"] is None
    assert routing["mode"] == ("factored" if gates else "shared")


def test_gates_mix_experts_and_the_answer_says_so(server: Served) -> None:
    answer = server.complete(gates={"alpha": 0.75, "gamma": -0.5}, max_tokens=4)
    assert answer["routing"]["gates"] == {"alpha": 0.75, "gamma": -0.5}
    assert answer["routing"]["generations"] == {"alpha": 1, "gamma": 1}


def test_empty_gates_are_the_shared_expert(server: Served) -> None:
    mixed = server.complete(gates={}, max_tokens=8, temperature=0)
    shared = server.complete(model="shared", max_tokens=8, temperature=0)
    assert mixed["choices"][0]["text"] == shared["choices"][0]["text"]
    assert mixed["routing"]["gates"] == {}


def test_experts_answer_differently(server: Served) -> None:
    texts = {
        server.complete(model=model, max_tokens=12, temperature=0)["choices"][0]["text"]
        for model in ("alpha", "beta", "gamma", "shared")
    }
    assert len(texts) == 4


def test_token_ids_and_text_are_the_same_prompt(server: Served) -> None:
    ids = server.runtime.tokenizer.encode(PROMPT)
    from_ids = server.complete(prompt=ids, max_tokens=8, temperature=0)
    from_text = server.complete(prompt=PROMPT, max_tokens=8, temperature=0)
    assert from_ids["choices"][0]["text"] == from_text["choices"][0]["text"]
    assert counts(from_ids) == counts(from_text)


def test_several_prompts_are_answered_in_order_each_with_its_routing(server: Served) -> None:
    prompts = [PROMPT, "SORT: river zebra river apple", "¿Cómo se dice «lemon» en español?"]
    answer = server.complete(prompt=prompts, max_tokens=4, temperature=0)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert [list(choice["routing"]["gates"]) for choice in answer["choices"]] == [
        ["alpha"],
        ["gamma"],
        ["beta"],
    ]
    assert "routing" not in answer
    alone = [
        server.complete(prompt=prompt, max_tokens=4, temperature=0)["choices"][0]["text"]
        for prompt in prompts
    ]
    assert [choice["text"] for choice in answer["choices"]] == alone


def test_lists_of_token_ids_are_several_prompts(server: Served) -> None:
    ids = server.runtime.tokenizer.encode(PROMPT)
    answer = server.complete(prompt=[ids, ids[:3]], max_tokens=2)
    assert len(answer["choices"]) == 2
    assert answer["usage"]["prompt_tokens"] == len(ids) + 3


def test_n_choices_share_one_prompt_and_count_it_once(server: Served) -> None:
    answer = server.complete(n=3, max_tokens=8, seed=7, ignore_eos=True)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert len({choice["text"] for choice in answer["choices"]}) == 3
    single = server.complete(max_tokens=8, seed=7, ignore_eos=True)
    assert answer["choices"][0]["text"] == single["choices"][0]["text"]
    assert answer["usage"]["prompt_tokens"] == single["usage"]["prompt_tokens"]
    assert answer["usage"]["completion_tokens"] == 24


def test_a_seed_makes_sampling_repeatable(server: Served) -> None:
    def text(seed: int) -> str:
        return str(server.complete(seed=seed, max_tokens=12, top_k=40, top_p=0.95)["choices"][0]["text"])

    assert text(3) == text(3)
    assert text(-3) == text(-3)
    assert len({text(seed) for seed in (3, 4, -3, -(2**63), 2**63 - 1)}) == 5


def test_a_stop_string_ends_the_text_and_is_not_part_of_it(server: Served) -> None:
    options: dict[str, Any] = {"max_tokens": 40, "seed": 11, "ignore_eos": True}
    whole = server.complete(**options)["choices"][0]["text"]
    stop = whole[len(whole) // 2]
    choice = server.complete(**options, stop=[stop])["choices"][0]
    assert choice["text"] == whole[: whole.index(stop)]
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] == stop


def test_neutral_values_of_unsupported_fields_are_accepted(server: Served) -> None:
    server.complete(
        max_tokens=1,
        best_of=1,
        echo=False,
        logit_bias={},
        logprobs=None,
        suffix=None,
        stop=None,
        user="somebody",
        seed=None,
        stream_options=None,
        length_penalty=1,
    )


def test_thirty_two_clients_at_once_with_different_experts_each_get_their_own(server: Served) -> None:
    ways: list[dict[str, Any]] = [
        {"model": "alpha"},
        {"model": "beta"},
        {"model": "gamma"},
        {"model": "shared"},
        {"model": "tiny"},
        {"model": "tiny", "gates": {"alpha": 0.5, "beta": 0.5}},
        {"model": "tiny", "gates": {"beta": 0.25, "gamma": 0.75}},
        {"model": "tiny", "gates": {"alpha": 1.5, "beta": -0.5, "gamma": 0.25}},
    ]
    bodies = [
        {**ways[i % len(ways)], "prompt": f"Add {i} and {i}.", "max_tokens": 4 + i % 13, "temperature": 0}
        for i in range(32)
    ]
    alone = [server.complete(**body) for body in bodies]

    async def together() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def one(body: dict[str, Any]) -> Any:
                gates = body.get("gates")
                plain = {name: value for name, value in body.items() if name != "gates"}
                extra = {"gates": gates} if gates else None
                return await client.completions.create(**plain, extra_body=extra)

            return list(await asyncio.gather(*map(one, bodies)))

    for answer, expected in zip(asyncio.run(together()), alone, strict=True):
        assert answer.choices[0].text == expected["choices"][0]["text"]
        assert answer.model_dump()["routing"] == expected["routing"]


def test_a_request_id_is_taken_over_or_made(server: Served) -> None:
    body = {"model": "shared", "prompt": "a", "max_tokens": 1}
    assert (
        server.post("/v1/completions", body, headers={"X-Request-Id": "mine-1"}).headers["x-request-id"]
        == "mine-1"
    )
    made = server.post("/v1/completions", body, headers={"X-Request-Id": "has a space"}).headers[
        "x-request-id"
    ]
    assert len(made) == 32
