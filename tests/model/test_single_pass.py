"""Gates that are found in the middle of a request's own prefill: below it the prompt goes without them."""

import re

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from experts.routing import extract_features, select_gates
from service.core import SamplingParams
from service.engine.live import Question
from service.scheduler.policy import Budget
from tests.fixtures.tiny import VOCABULARY, tiny_model
from tests.model.harness import Harness, materialised, prompt_ids, random_expert
from tests.model.routers import random_router

NAMES = ("e0", "e1", "e2")
DEPTH = 4
LONG = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
ONE_STEP = Budget(64, 64)


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma3", "gpt2"])
def path(request, tmp_path_factory: pytest.TempPathFactory):
    name = "n_layer" if request.param == "gpt2" else "num_hidden_layers"
    more = {name: DEPTH}
    if request.param == "gemma3":
        more["layer_types"] = ["sliding_attention", "full_attention"] * 2
    return tiny_model(request.param, tmp_path_factory.mktemp(request.param) / "m", seed=6, **more)


@pytest.fixture(scope="module")
def experts(path):
    plain = AutoModelForCausalLM.from_pretrained(path)
    # Where the table is the head too, one plain model cannot have it gated above and not below.
    tied = plain.config.tie_word_embeddings
    return {
        name: random_expert(plain, name, seed=i, ranks=(3, 5), only=lambda n: not (tied and table(n)))
        for i, name in enumerate(NAMES)
    }


@pytest.fixture
def native(native, path):
    if native == "on" and "gpt2" in str(path):
        pytest.skip("these layers are not compiled")
    return native


def table(name: str) -> bool:
    """Embeddings of tokens or positions."""
    return any(part in name for part in ("embed_tokens", "wte", "wpe"))


def above(layer: int):
    """Parameters of the layers from `layer` on, counted from 0, and of what stands behind the last."""

    def test(name: str) -> bool:
        if table(name):
            return layer == 0
        found = re.search(r"\.(?:layers|h)\.(\d+)\.", name)
        return found is None or int(found.group(1)) >= layer

    return test


@torch.inference_mode()
def _expected(path, experts, gates, layer, prompt, tokens: int = 20) -> list[int]:
    """Greedy tokens of a plain model whose lower layers carry the gates for the answer's tokens alone."""
    mix = [(experts[name], gate) for name, gate in gates.items()]
    cache = DynamicCache(config=AutoConfig.from_pretrained(path))
    ids, model, found = torch.tensor([prompt]), materialised(path, mix, only=above(layer)), []
    for _ in range(tokens):
        logits = model(ids, past_key_values=cache, use_cache=True).logits[0, -1]
        found.append(int(logits.argmax()))
        if len(found) == 1 and layer:
            model = materialised(path, mix)
        ids = torch.tensor([found[-1:]])
    return found


def _gates(path, router, prompt):
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    row = router.probabilities(extract_features(plain, [prompt], router.spec))[0]
    return select_gates(row, router.names, router.top_k, router.threshold)


@pytest.mark.parametrize(("layer", "taps"), [(1, ()), (2, ()), (4, ()), (3, (1, 2))])
def test_the_prompt_has_its_gates_from_the_routing_depth_on_and_the_answer_everywhere(
    path, experts, layer, taps, native
):
    router = random_router(path, NAMES, layer=layer, taps=taps, pooling="mean_last")
    harness = Harness(
        path, list(experts.values()), router=router, single_pass=True, native=native, budget=ONE_STEP
    )
    prompts = [prompt_ids(40 + i, 9 + 11 * i, VOCABULARY) for i in range(5)]
    harness.submit("beside", prompts[0], {"e0": 1.0}, LONG)
    for i, prompt in enumerate(prompts):
        harness.submit(f"r{i}", prompt, None, LONG)
        harness.step()
    harness.run()
    assert sum(stats.routed_requests for stats in harness.stats) == 0
    seen = set()
    for i, prompt in enumerate(prompts):
        outcome = harness.finished(f"r{i}").routing
        assert outcome.gates == _gates(path, router, prompt)
        assert outcome.router_generation == router.generation
        assert harness.tokens(f"r{i}") == _expected(path, experts, outcome.gates, layer, prompt), i
        seen.add(outcome.pattern)
    assert len(seen) > 1
    # Gates that the client names hold in every layer.
    assert harness.tokens("beside") == _expected(path, experts, {"e0": 1.0}, 0, prompts[0])
    harness.assert_idle()


def test_the_first_token_comes_in_the_step_that_routes(path, experts, native):
    router = random_router(path, NAMES, layer=2)
    harness = Harness(
        path, list(experts.values()), router=router, single_pass=True, native=native, budget=ONE_STEP
    )
    harness.submit("r", prompt_ids(1, 30, VOCABULARY), None, LONG)
    harness.step()
    assert len(harness.tokens("r")) == 1
    harness.run()
    harness.assert_idle()


def test_preempted_single_pass_requests_begin_again_with_the_same_gates(path, experts, native):
    router = random_router(path, NAMES, layer=2)
    harness = Harness(
        path, list(experts.values()), router=router, single_pass=True, native=native, budget=Budget(64, 48),
        kv_bytes=0, max_tokens=100,
    )  # fmt: skip
    prompts = [prompt_ids(60 + i, 12 + 6 * i, VOCABULARY) for i in range(5)]
    sampling = SamplingParams(max_tokens=50, temperature=0, ignore_eos=True)
    for i, prompt in enumerate(prompts):
        harness.submit(f"r{i}", prompt, None, sampling)
    harness.run()
    assert harness.preemptions > 0
    for i, prompt in enumerate(prompts):
        gates = harness.finished(f"r{i}").routing.gates
        assert gates == _gates(path, router, prompt)
        assert harness.tokens(f"r{i}") == _expected(path, experts, gates, 2, prompt, 50), i
    harness.assert_idle()


def test_several_choices_of_one_prompt_follow_the_one_that_was_routed(path, experts, native):
    router = random_router(path, NAMES, layer=2)
    harness = Harness(
        path, list(experts.values()), router=router, single_pass=True, native=native, budget=ONE_STEP
    )
    prompt = prompt_ids(5, 41, VOCABULARY)
    for i in range(3):
        harness.submit(f"c{i}", prompt, None, LONG, leader="c0" if i else None)
    harness.run()
    gates = harness.finished("c0").routing.gates
    expected = _expected(path, experts, gates, 2, prompt)
    assert all(harness.tokens(f"c{i}") == expected for i in range(3))
    assert [harness.finished(f"c{i}").usage.cached_tokens for i in range(3)] == [0, 32, 32]
    # The same gates by name gate the lower layers too: nothing of the others is found.
    harness.submit("named", prompt, gates, LONG)
    harness.run()
    assert harness.finished("named").usage.cached_tokens == 0
    assert harness.tokens("named") == _expected(path, experts, gates, 0, prompt)
    harness.assert_idle()


def test_an_answer_that_becomes_part_of_a_prompt_is_computed_as_a_prompt(path, experts, native):
    # One expert, so that both turns have the same gates.
    router = random_router(path, NAMES[:1], layer=2)
    harness = Harness(
        path, list(experts.values()), router=router, single_pass=True, native=native, budget=ONE_STEP
    )
    first = prompt_ids(5, 20, VOCABULARY)
    harness.submit("first", first, None, LONG)
    harness.run()
    second = (*first, *harness.tokens("first"), *prompt_ids(6, 15, VOCABULARY))
    for i in range(2):
        harness.submit(f"c{i}", second, None, LONG, leader="c0" if i else None)
    harness.run()
    assert harness.finished("c1").usage.cached_tokens == 48
    expected = _expected(path, experts, {"e0": 1.0}, 2, second)
    assert harness.tokens("c0") == harness.tokens("c1") == expected
    harness.assert_idle()


def test_what_cannot_be_routed_in_one_pass_is_routed_before(path, experts, native):
    router = random_router(path, NAMES, layer=2, max_tokens=40)
    harness = Harness(
        path, list(experts.values()), router=router, single_pass=True, native=native, max_tokens=200,
        budget=Budget(64, 48),
    )  # fmt: skip
    prompts = {
        "too long to read": prompt_ids(1, 45, VOCABULARY),
        "too long for a step": prompt_ids(2, 90, VOCABULARY),
    }
    for name, prompt in prompts.items():
        harness.submit(name, prompt, None, LONG)
    asked = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True, prompt_logprobs=1)
    prompts["logprobs"] = prompt_ids(3, 20, VOCABULARY)
    harness.submit("logprobs", prompts["logprobs"], None, asked)
    harness.run()
    assert sum(stats.routed_requests for stats in harness.stats) == 3
    for name, prompt in prompts.items():
        gates = harness.finished(name).routing.gates
        assert gates == _gates(path, router, prompt)
        assert harness.tokens(name) == _expected(path, experts, gates, 0, prompt)
    harness.assert_idle()


@pytest.mark.parametrize(
    ("layer", "taps"), [(1, ()), (2, ()), (3, ()), (4, ()), (-1, ()), (3, (1,)), (4, (1, 3)), (-1, (2, 4))]
)
def test_a_router_of_any_depth_reads_what_plain_transformers_computes(path, experts, layer, taps, native):
    router = random_router(path, NAMES, layer=layer, taps=taps, pooling="mean_last")
    harness = Harness(path, list(experts.values()), router=router, native=native)
    prompts = [prompt_ids(i, length, VOCABULARY) for i, length in enumerate([1, 7, 30, 60])]
    found: dict[int, torch.Tensor] = {}
    harness.submit("beside", prompt_ids(9, 20, VOCABULARY), {"e0": 1.0}, LONG)
    harness.step()
    for i, prompt in enumerate(prompts):
        harness.engine.ask(Question(prompt, lambda features, i=i: found.__setitem__(i, features)))
    harness.submit("routed", prompts[2], None, LONG)
    harness.run()
    # Alone in its step too, where the layers above the depth need not run.
    harness.engine.ask(Question(prompts[3], lambda features: found.__setitem__(4, features)))
    harness.run()
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    expected = extract_features(plain, [*prompts, prompts[3]], router.spec)
    torch.testing.assert_close(torch.stack([found[i] for i in range(5)]), expected, rtol=1e-4, atol=1e-4)
    assert harness.finished("routed").routing.gates == _gates(path, router, prompts[2])
    for name, prompt, gates in (
        ("beside", prompt_ids(9, 20, VOCABULARY), {"e0": 1.0}),
        ("routed", prompts[2], harness.finished("routed").routing.gates),
    ):
        assert harness.tokens(name) == _expected(path, experts, gates, 0, prompt)
    harness.assert_idle()


@pytest.mark.parametrize("beyond", [{"layer": 5}, {"layer": -1, "taps": (5,)}])
def test_a_router_that_reads_beyond_the_model_is_refused(path, beyond):
    router = random_router(path, NAMES, layer=4)
    deeper = router.spec.model_copy(update=beyond)
    object.__setattr__(router, "spec", deeper)
    with pytest.raises(Exception, match="the router reads layer 5, the model has 4"):
        Harness(path, router=router)
