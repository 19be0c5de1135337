"""Log-probabilities of a served model against transformers' own."""

from typing import Any

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.api.harness import Served
from tests.fixtures.tiny import VOCABULARY, TinyFamily

PROMPT = "what is the capital of this country"
STEPS = 6


def plain(family: TinyFamily, ids: list[int]) -> tuple[list[int], torch.Tensor]:
    """Greedy ids after the prompt, and (tokens, vocabulary) log-probabilities of what follows each."""
    model = AutoModelForCausalLM.from_pretrained(family.bundle / "shared", dtype=torch.float32)
    ids = list(ids)
    with torch.inference_mode():
        for _ in range(STEPS):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        return ids, model(torch.tensor([ids])).logits[0].log_softmax(-1)


def texts_of(server: Served, ids: list[int]) -> list[bytes]:
    alphabet = server.runtime.tokenizer.convert_ids_to_tokens(ids)
    special = set(server.runtime.tokenizer.all_special_tokens)
    decode = server.runtime.tokenizer.backend_tokenizer.decoder.decode
    return [piece.encode() if piece in special else decode([piece]).encode() for piece in alphabet]


@pytest.mark.parametrize("count", [0, 3])
def test_an_echoed_completion_scores_prompt_and_answer_as_transformers_does(
    server: Served, family: TinyFamily, count: int
) -> None:
    ids = list(server.runtime.tokenizer.encode(PROMPT))
    expected, scores = plain(family, ids)
    answer = server.complete(
        model="shared",
        prompt=PROMPT,
        max_tokens=STEPS,
        temperature=0,
        echo=True,
        logprobs=count,
        ignore_eos=True,
    )
    [choice] = answer["choices"]
    found = choice["logprobs"]
    assert choice["text"].startswith(PROMPT)
    assert len({len(found[name]) for name in found}) == 1
    assert len(found["tokens"]) == len(expected)
    assert found["token_logprobs"][0] is None
    assert found["top_logprobs"][0] is None
    for position, token in enumerate(expected[1:], 1):
        assert found["token_logprobs"][position] == pytest.approx(
            float(scores[position - 1, token]), abs=2e-3
        )
        best = found["top_logprobs"][position]
        assert max(1, count) <= len(best) <= count + 1
        assert best[found["tokens"][position]] == pytest.approx(found["token_logprobs"][position])
        if count:
            assert max(best.values()) == pytest.approx(float(scores[position - 1].max()), abs=2e-3)
    text_of_prompt = [choice["text"][begin:] for begin in found["text_offset"][: len(ids)]]
    assert all(rest.startswith(text) for rest, text in zip(text_of_prompt, found["tokens"], strict=False))


def test_a_prompt_of_one_token_has_nothing_that_predicts_it(server: Served) -> None:
    [choice] = server.complete(prompt="q", max_tokens=2, echo=True, logprobs=1, ignore_eos=True)["choices"]
    assert choice["logprobs"]["tokens"][0] == "q"
    assert [value is None for value in choice["logprobs"]["token_logprobs"]] == [True, False, False]
    assert choice["logprobs"]["text_offset"][:2] == [0, 1]


def test_the_tokens_of_a_chat_are_its_content_and_the_greedy_one_is_the_likeliest(
    client: openai.OpenAI,
) -> None:
    answer = client.chat.completions.create(
        model="beta",
        messages=[{"role": "user", "content": "Add 1 and 2."}],
        max_tokens=12,
        temperature=0,
        logprobs=True,
        top_logprobs=4,
    )
    [choice] = answer.choices
    assert choice.logprobs is not None
    content = choice.logprobs.content
    assert content
    raw = b"".join(bytes(one.bytes or ()) for one in content)
    assert raw.decode(errors="replace") == choice.message.content
    for one in content:
        assert len(one.top_logprobs) == 4
        assert one.top_logprobs[0].logprob == one.logprob <= 0
        values = [top.logprob for top in one.top_logprobs]
        assert values == sorted(values, reverse=True)


def test_a_stream_reports_what_the_whole_answer_does(server: Served) -> None:
    body: dict[str, Any] = {
        "model": "tiny",
        "prompt": ["Add 1 and 2.", "SORT: green zebra"],
        "n": 2,
        "seed": 3,
        "max_tokens": 8,
        "logprobs": 2,
    }
    for echo in (False, True):
        whole = server.complete(**body, echo=echo)["choices"]
        streamed: list[list[Any]] = [[], [], [], []]
        for chunk in server.chunks("/v1/completions", {**body, "echo": echo}):
            [choice] = chunk["choices"]
            if choice["logprobs"] is not None:
                streamed[choice["index"]].append(choice["logprobs"])
        for choice, parts in zip(whole, streamed, strict=True):
            for name in ("tokens", "text_offset"):
                assert [entry for part in parts for entry in part[name]] == choice["logprobs"][name]
            values = [value for part in parts for value in part["token_logprobs"]]
            assert values == pytest.approx(choice["logprobs"]["token_logprobs"], abs=1e-3)


def test_reporting_changes_no_answer(server: Served) -> None:
    options: dict[str, Any] = {"seed": 9, "max_tokens": 12, "top_p": 0.9, "repetition_penalty": 1.2}
    silent = server.complete(**options)["choices"][0]
    for extra in ({"logprobs": 5}, {"logprobs": 1, "echo": True}):
        told = server.complete(**options, **extra)["choices"][0]
        assert told["text"].removeprefix("Add 1 and 2.") == silent["text"]
        assert told["finish_reason"] == silent["finish_reason"]


def test_a_bias_forces_a_token_and_forbids_others_and_leaves_the_scores_alone(server: Served) -> None:
    options: dict[str, Any] = {"model": "alpha", "max_tokens": 3, "temperature": 0, "ignore_eos": True}
    free = server.complete(**options, logprobs=1)["choices"][0]["logprobs"]
    [wanted] = server.runtime.tokenizer.encode("q")
    forced = server.complete(**options, logprobs=1, logit_bias={str(wanted): 100})["choices"][0]
    assert forced["text"] == "qqq"
    assert forced["logprobs"]["token_logprobs"][0] < -1
    assert max(forced["logprobs"]["top_logprobs"][0].values()) == pytest.approx(
        free["token_logprobs"][0], abs=1e-3
    )
    others = {str(token): -100 for token in range(VOCABULARY) if token != wanted}
    assert server.complete(**options, logit_bias=others)["choices"][0]["text"] == "qqq"
