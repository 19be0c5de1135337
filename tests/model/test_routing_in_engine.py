"""The router reads in the engine what it was trained on, beside other requests, and its word becomes gates."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from experts.bundle import Bundle
from experts.routing import extract_features, select_gates
from service.core import SamplingParams
from service.engine.live import Question
from tests.fixtures.tiny import VOCABULARY, tiny_family
from tests.model.harness import Harness, materialised, prompt_ids, reference

LONG = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def bundle(request, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    root: Path = tmp_path_factory.mktemp(request.param)
    return Bundle.open(tiny_family(root, architecture=request.param).bundle)


def _harness(bundle: Bundle, **options) -> Harness:
    return Harness(
        bundle.shared_path,
        [bundle.expert(n) for n in bundle.expert_names()],
        router=bundle.router(),
        **options,
    )


def test_features_read_in_the_engine_equal_those_of_plain_transformers(bundle):
    harness = _harness(bundle)
    prompts = [prompt_ids(i, length, VOCABULARY) for i, length in enumerate([1, 7, 30, 90])]
    found: dict[int, torch.Tensor] = {}
    harness.submit("beside", prompt_ids(9, 20, VOCABULARY), {"alpha": 1.0}, LONG)
    harness.step()
    for i, prompt in enumerate(prompts):
        harness.engine.ask(Question(prompt, lambda features, i=i: found.__setitem__(i, features)))
    harness.run()
    plain = AutoModelForCausalLM.from_pretrained(bundle.shared_path, dtype=torch.float32).eval()
    expected = extract_features(plain, prompts, bundle.router().spec)
    torch.testing.assert_close(torch.stack([found[i] for i in range(4)]), expected, rtol=1e-4, atol=1e-4)


def test_a_routed_request_is_generated_with_the_gates_that_it_reports(bundle):
    harness = _harness(bundle)
    router = bundle.router()
    plain = AutoModelForCausalLM.from_pretrained(bundle.shared_path, dtype=torch.float32).eval()
    prompts = [prompt_ids(20 + i, 10 + i, VOCABULARY) for i in range(5)]
    for i, prompt in enumerate(prompts):
        harness.submit(f"r{i}", prompt, None, LONG)
    harness.run()
    experts = {name: bundle.expert(name) for name in bundle.expert_names()}
    for i, prompt in enumerate(prompts):
        outcome = harness.finished(f"r{i}").routing
        row = router.probabilities(extract_features(plain, [prompt], router.spec))[0]
        assert outcome.gates == select_gates(row, router.names, router.top_k, router.threshold)
        assert outcome.router_generation == router.generation
        assert outcome.confidence == pytest.approx(float(row.max()), abs=1e-3)
        model = materialised(bundle.shared_path, [(experts[n], g) for n, g in outcome.gates.items()])
        assert harness.tokens(f"r{i}") == reference(model, prompt, 16)
    harness.assert_idle()


def test_a_long_prompt_is_routed_by_its_end_and_still_generated_whole(bundle):
    harness = _harness(bundle, max_tokens=250)
    spec = bundle.router().spec
    prompt = prompt_ids(3, 200, VOCABULARY)
    harness.submit("r", prompt, None, LONG)
    harness.run()
    assert harness.finished("r").usage.prompt_tokens == 200
    assert len(spec.cut(prompt)) == min(200, spec.max_tokens)


def test_without_a_router_a_routed_request_fails_clearly(bundle):
    harness = Harness(bundle.shared_path)
    harness.submit("r", prompt_ids(3, 10, VOCABULARY), None, LONG)
    harness.run()
    assert "no router" in harness.terminal("r").error.message
    harness.assert_idle()
