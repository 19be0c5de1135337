"""A pooled state is that of the plain model with materialised weights, whatever it was computed beside."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from service.core import ExpertKey, Finished, SamplingParams
from service.engine import pooling as pooling_module
from service.scheduler.policy import Budget
from tests.fixtures.tiny import VOCABULARY
from tests.model.harness import GREEDY, Harness, inner, materialised, prompt_ids, random_expert, reference
from tests.model.routers import random_router
from tests.model.test_ground_truth import CASES

ONE = SamplingParams(max_tokens=1)
MIXES = {
    "bare": {},
    "alone": {"e0": 1.0},
    "mixed": {"e0": 0.75, "e1": 0.25},
    "odd": {"e1": -0.5, "e2": 1.5},
}


def _experts(path, count: int = 3, **options):
    plain = AutoModelForCausalLM.from_pretrained(path)
    return [random_expert(plain, f"e{i}", seed=i, ranks=(3, 5), **options) for i in range(count)]


def _model(path, experts, gates):
    return materialised(path, [(expert, gates[expert.name]) for expert in experts if expert.name in gates])


@torch.inference_mode()
def _pooled(model, prompt, pooling="mean") -> torch.Tensor:
    states = model.base_model(torch.tensor([prompt])).last_hidden_state[0]
    return states.mean(0) if pooling == "mean" else states[-1]


def _truth(path, experts, gates, prompt, pooling="mean") -> torch.Tensor:
    return _pooled(_model(path, experts, gates), prompt, pooling)


def _agrees(end: Finished, wanted: torch.Tensor, slack: float = 2e-4) -> None:
    assert end.pooled is not None
    found = torch.tensor(end.pooled)
    assert found.shape == wanted.shape
    assert float((found - wanted).norm() / wanted.norm()) < slack


@pytest.mark.parametrize(("architecture", "native"), CASES)
def test_prompts_in_pieces_beside_rows_that_generate(architecture, native, folders):
    path = folders[architecture]
    experts = _experts(path)
    harness = Harness(path, experts, native=native, budget=Budget(24, 7))
    prompts = {}
    for i, (name, gates) in enumerate(MIXES.items()):
        for kind in ("mean", "last", "text"):
            prompts[name, kind] = prompt_ids(10 * i + len(kind), 9 + 17 * i, VOCABULARY)
            pooling = None if kind == "text" else kind
            sampling = GREEDY if kind == "text" else ONE
            harness.submit(f"{name}-{kind}", prompts[name, kind], gates, sampling, pooling=pooling)
            harness.step()
    harness.run()
    models = {name: _model(path, experts, gates) for name, gates in MIXES.items()}
    for (name, kind), prompt in prompts.items():
        end = harness.finished(f"{name}-{kind}")
        if kind == "text":
            assert harness.tokens(f"{name}-{kind}") == reference(models[name], prompt, 8)
            assert end.pooled is None
            continue
        _agrees(end, _pooled(models[name], prompt, kind))
        assert harness.events[f"{name}-{kind}"] == [end]
        assert end.reason == "stop"
        assert end.usage.prompt_tokens == len(prompt)
        assert end.usage.completion_tokens == 0
        assert end.routing.gates == MIXES[name]
    harness.assert_idle()


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_the_prefix_cache_hides_no_token_from_a_pool(pooling, llama, native):
    experts = _experts(llama)
    harness = Harness(llama, experts, native=native)
    prompt = prompt_ids(1, 45, VOCABULARY)
    wanted = _truth(llama, experts, MIXES["mixed"], prompt, pooling)
    for name in ("first", "again"):
        harness.submit(name, prompt, MIXES["mixed"], ONE, pooling=pooling)
        harness.run()
        _agrees(harness.finished(name), wanted)
    # Only the last token's state needs nothing of what came before but its keys and values.
    assert harness.finished("again").usage.cached_tokens == (0 if pooling == "mean" else 32)
    # What was computed for a pool is found by those who generate.
    harness.submit("text", prompt, MIXES["mixed"])
    harness.run()
    assert harness.finished("text").usage.cached_tokens == 32
    harness.assert_idle()


def test_preempted_prompts_begin_their_pool_again(llama, native):
    experts = _experts(llama)
    harness = Harness(llama, experts, native=native, kv_bytes=0, max_tokens=100, budget=Budget(24, 8))
    gates = MIXES["mixed"]
    prompts = [prompt_ids(i, 60 + 4 * i, VOCABULARY) for i in range(4)]
    for i, prompt in enumerate(prompts):
        harness.submit(f"t{i}", prompt[:20], gates, SamplingParams(30, temperature=0, ignore_eos=True))
        harness.submit(f"p{i}", prompt, gates, ONE, pooling="mean", priority=1)
        harness.step()
    harness.run()
    assert harness.preemptions > 0
    for i, prompt in enumerate(prompts):
        _agrees(harness.finished(f"p{i}"), _truth(llama, experts, gates, prompt))
    harness.assert_idle()


@pytest.mark.parametrize(("layer", "taps"), [(-1, ()), (1, ()), (-1, (1,))])
def test_routed_gates_hold_in_all_layers_even_where_texts_are_routed_on_their_way(layer, taps, llama, native):
    experts = _experts(llama)
    router = random_router(llama, [expert.name for expert in experts], layer=layer, taps=taps)
    harness = Harness(llama, experts, native=native, router=router, single_pass=True, budget=Budget(64, 64))
    prompts = [prompt_ids(i, 12 + 9 * i, VOCABULARY) for i in range(4)]
    for i, prompt in enumerate(prompts):
        harness.submit(f"p{i}", prompt, None, ONE, pooling="mean")
        harness.submit(f"t{i}", prompt)
    harness.run()
    for i, prompt in enumerate(prompts):
        end = harness.finished(f"p{i}")
        assert end.routing.router_generation == 3
        assert end.routing.gates
        _agrees(end, _truth(llama, experts, end.routing.gates, prompt))
    harness.assert_idle()


def test_a_cancelled_pool_gives_everything_back_and_no_vector(llama, native):
    harness = Harness(llama, _experts(llama), native=native, budget=Budget(16, 16))
    harness.submit("gone", prompt_ids(1, 80, VOCABULARY), MIXES["mixed"], ONE, pooling="mean")
    harness.step()
    assert harness.catalogue.leases()[ExpertKey("e0", 1)] == 1
    harness.cancel("gone")
    assert harness.finished("gone").reason == "cancelled"
    assert harness.finished("gone").pooled is None
    harness.assert_idle()


def test_a_pool_past_its_deadline_is_ended(llama, native):
    harness = Harness(llama, native=native, budget=Budget(16, 16))
    harness.submit("late", prompt_ids(1, 80, VOCABULARY), {}, ONE, pooling="mean", deadline=0.0)
    harness.run()
    assert harness.terminal("late").error.code == "deadline_exceeded"
    harness.assert_idle()


def test_a_pool_that_cannot_be_made_fails_alone_and_leaves_nothing_to_find(llama, native, monkeypatch):
    harness = Harness(llama, native=native)
    put = pooling_module.Pool.put

    def poisoned(pool, first, states):
        put(pool, first, states * float("nan") if pool.pooling == "last" else states)

    monkeypatch.setattr(pooling_module.Pool, "put", poisoned)
    prompt = prompt_ids(1, 40, VOCABULARY)
    harness.submit("bad", prompt, {}, ONE, pooling="last")
    harness.submit("good", prompt_ids(2, 40, VOCABULARY), {}, ONE, pooling="mean")
    harness.run()
    assert "NaN or infinite states" in harness.terminal("bad").error.message
    assert harness.finished("good").pooled is not None
    harness.submit("text", prompt, {})
    harness.run()
    assert harness.finished("text").usage.cached_tokens == 0
    harness.assert_idle()


def test_an_expert_that_is_replaced_meanwhile_stays_that_of_the_pool(llama, native):
    experts = _experts(llama)
    harness = Harness(llama, experts, native=native, budget=Budget(16, 16))
    prompt = prompt_ids(4, 70, VOCABULARY)
    harness.submit("old", prompt, {"e0": 1.0}, ONE, pooling="mean")
    harness.step()
    plain = AutoModelForCausalLM.from_pretrained(llama)
    harness.publish(random_expert(plain, "e0", seed=77, generation=2))
    harness.run()
    assert harness.finished("old").routing.generations == {"e0": 1}
    _agrees(harness.finished("old"), _truth(llama, experts, {"e0": 1.0}, prompt))
    harness.assert_idle()


def test_materialised_weights_give_the_same_pool_and_say_so(llama):
    experts = _experts(llama, exact=False, only=inner)
    harness = Harness(llama, experts, native="on", mode="merged", budget=Budget(32, 16), prefix_cache=False)
    prompt = prompt_ids(4, 70, VOCABULARY)
    modes = []
    for name in ("first", "second", "third"):
        harness.submit(name, prompt, {"e0": 1.0}, ONE, pooling="mean")
        harness.run()
        _agrees(harness.finished(name), _truth(llama, experts, {"e0": 1.0}, prompt))
        modes.append(harness.finished(name).routing.mode)
    assert modes[-1] == "merged"
    harness.assert_idle()
