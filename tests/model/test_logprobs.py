"""Log-probabilities are those of the plain model with materialised weights, wherever the tokens were computed."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from service.core import SamplingParams, TextDelta, TokenLogprobs
from service.engine import engine as engine_module
from service.scheduler.policy import Budget
from tests.fixtures.tiny import VOCABULARY
from tests.model.harness import Harness, materialised, prompt_ids, random_expert
from tests.model.test_ground_truth import CASES

GATES = {"e0": 0.75, "e1": 0.25}


def _experts(path):
    plain = AutoModelForCausalLM.from_pretrained(path)
    return [random_expert(plain, f"e{i}", seed=i, ranks=(3, 5)) for i in range(2)]


@torch.inference_mode()
def _truth(path, experts, tokens) -> torch.Tensor:
    """(tokens - 1, vocabulary): row i says what was thought of token i + 1."""
    model = materialised(path, [(expert, GATES[expert.name]) for expert in experts])
    return torch.log_softmax(model(torch.tensor([tokens])).logits[0, :-1], dim=-1)


def _agree(found: TokenLogprobs, token: int, row: torch.Tensor, count: int) -> None:
    assert found.token == token
    assert found.logprob == pytest.approx(float(row[token]), abs=1e-4)
    near = [int((row > row[token] + slack).sum()) + 1 for slack in (1e-4, -1e-4)]
    assert near[0] <= found.rank <= near[1]
    assert len(found.top) == count
    best = row.topk(count).values.tolist()
    assert [value for _, value in found.top] == pytest.approx(best, abs=1e-4)
    for place, value in found.top:
        assert value == pytest.approx(float(row[place]), abs=1e-4)


def _check(harness: Harness, name: str, prompt, path, experts, sampling: SamplingParams) -> None:
    answer = harness.tokens(name)
    rows = _truth(path, experts, [*prompt, *answer])
    reports = [
        report for event in harness.events[name] if isinstance(event, TextDelta) for report in event.logprobs
    ]
    if sampling.logprobs is None:
        assert not reports
    else:
        assert len(reports) == len(answer)
        for i, token in enumerate(answer):
            _agree(reports[i], token, rows[len(prompt) - 1 + i], sampling.logprobs)
    of_prompt = harness.finished(name).prompt_logprobs
    if sampling.prompt_logprobs is None:
        assert of_prompt is None
    else:
        assert len(of_prompt) == len(prompt) - 1
        for i, found in enumerate(of_prompt):
            _agree(found, prompt[i + 1], rows[i], sampling.prompt_logprobs)


@pytest.mark.parametrize(("architecture", "native"), CASES)
def test_tokens_and_prompts_in_pieces_beside_other_rows(architecture, native, folders):
    path = folders[architecture]
    experts = _experts(path)
    harness = Harness(path, experts, native=native, budget=Budget(24, 7))
    asked = {
        "both": SamplingParams(10, temperature=0, ignore_eos=True, logprobs=3, prompt_logprobs=2),
        "drawn": SamplingParams(
            10, temperature=1.5, top_k=9, seed=4, frequency_penalty=1.0, logit_bias=((7, 5.0),),
            ignore_eos=True, logprobs=20,
        ),
        "prompt": SamplingParams(2, temperature=0, ignore_eos=True, prompt_logprobs=0),
        "neither": SamplingParams(10, temperature=0, ignore_eos=True),
        "one token": SamplingParams(3, temperature=0, ignore_eos=True, logprobs=0, prompt_logprobs=5),
    }  # fmt: skip
    lengths = {"both": 50, "drawn": 20, "prompt": 33, "neither": 20, "one token": 1}
    prompts = {name: prompt_ids(i, length, VOCABULARY) for i, (name, length) in enumerate(lengths.items())}
    for name, sampling in asked.items():
        harness.submit(name, prompts[name], GATES, sampling)
        harness.step()
    harness.run()
    for name, sampling in asked.items():
        _check(harness, name, prompts[name], path, experts, sampling)
    harness.assert_idle()


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_preempted_and_resumed_requests_report_every_token_once(architecture, folders, native):
    path = folders[architecture]
    experts = _experts(path)
    harness = Harness(path, experts, native=native, kv_bytes=0, max_tokens=100, budget=Budget(24, 16))
    sampling = SamplingParams(60, temperature=0, ignore_eos=True, logprobs=2, prompt_logprobs=1)
    prompts = [prompt_ids(i, 9 + 4 * i, VOCABULARY) for i in range(6)]
    for i, prompt in enumerate(prompts):
        harness.submit(f"r{i}", prompt, GATES, sampling)
    harness.run()
    assert harness.preemptions > 0
    for i, prompt in enumerate(prompts):
        _check(harness, f"r{i}", prompt, path, experts, sampling)
    harness.assert_idle()


def test_a_prefix_from_the_cache_changes_no_log_probability(llama, native):
    experts = _experts(llama)
    harness = Harness(llama, experts, native=native)
    sampling = SamplingParams(10, temperature=0, ignore_eos=True, logprobs=4)
    prompt = prompt_ids(1, 45, VOCABULARY)
    for name in ("first", "again"):
        harness.submit(name, prompt, GATES, sampling)
        harness.run()
        _check(harness, name, prompt, llama, experts, sampling)
    assert harness.finished("again").usage.cached_tokens == 32
    harness.assert_idle()


def test_a_prompt_that_cannot_be_reported_fails_alone(llama, monkeypatch):
    harness = Harness(llama)
    asked = SamplingParams(10, temperature=0, ignore_eos=True, prompt_logprobs=1)
    harness.submit("bad", prompt_ids(1, 20, VOCABULARY), {}, asked)
    harness.submit(
        "good", prompt_ids(2, 20, VOCABULARY), {}, SamplingParams(10, temperature=0, ignore_eos=True)
    )

    def explode(*_):
        raise ValueError("no words for it")

    monkeypatch.setattr(engine_module, "prompt_logprobs", explode)
    harness.run()
    assert "no words for it" in harness.terminal("bad").error.message
    assert len(harness.tokens("good")) == 10
    harness.assert_idle()
