"""The router reads in the engine what it was trained on, beside other requests, and its word becomes gates."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from prometheus_client import CollectorRegistry
from transformers import AutoModelForCausalLM

from experts.bundle import Bundle
from experts.routing import extract_features, select_gates
from service.core import RoutingChoice, SamplingParams
from service.engine.live import Question
from service.metrics import Metrics
from service.scheduler.policy import Budget
from tests.fixtures.tiny import VOCABULARY, tiny_family, tiny_model
from tests.model.harness import Harness, materialised, prompt_ids, random_expert, reference
from tests.model.routers import random_router, random_staged

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


NAMES = ("e0", "e1", "e2")
STAGED = [prompt_ids(70 + i, 6 + 5 * i, VOCABULARY) for i in range(4)]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("deep") / "m", seed=6, num_hidden_layers=4)


@pytest.fixture(scope="module")
def experts(deep):
    plain = AutoModelForCausalLM.from_pretrained(deep)
    return {name: random_expert(plain, name, seed=i) for i, name in enumerate(NAMES)}


def _layers_run(harness: Harness) -> list[tuple[int, int]]:
    """(layer from 1, tokens) of every decoder layer that runs from now on, whichever way."""
    ran: list[tuple[int, int]] = []
    native = harness.model.native
    if native is None:
        for number, layer in enumerate(harness.model.model.model.layers, start=1):
            layer.register_forward_pre_hook(
                lambda _m, args, number=number: ran.append((number, args[0].shape[1]))
            )
    else:
        run = native.run

        def watched(hidden, first, last, base=0):
            ran.extend((layer, len(hidden)) for layer in range(first + 1, last + 1))
            return run(hidden, first, last, base)

        native.run = watched
    return ran


def _assert_answered(deep, experts, harness, router, prompts: Sequence[Sequence[int]]) -> None:
    """By the gates that the router gives for plain features, and with those gates' tokens."""
    plain = AutoModelForCausalLM.from_pretrained(deep, dtype=torch.float32).eval()
    rows = router.probabilities(extract_features(plain, prompts, router.spec))
    for i, prompt in enumerate(prompts):
        outcome = harness.finished(f"r{i}").routing
        assert outcome.gates == select_gates(rows[i], router.names, router.top_k, router.threshold), i
        assert outcome.confidence == pytest.approx(float(rows[i].max()), abs=1e-3)
        model = materialised(deep, [(experts[n], g) for n, g in outcome.gates.items()])
        assert harness.tokens(f"r{i}") == reference(model, prompt, 16), i


@pytest.mark.parametrize("layer", [3, -1])
def test_where_the_coarse_stage_settles_all_prompts_the_layers_above_do_not_run(deep, experts, layer, native):
    router = random_staged(deep, NAMES, STAGED, layer=layer, tap=1, settled=4)
    harness = Harness(deep, list(experts.values()), router=router, native=native, budget=Budget(256, 256))
    ran = _layers_run(harness)
    for i, prompt in enumerate(STAGED):
        harness.submit(f"r{i}", prompt, None, LONG)
    harness.step()
    assert ran == [(1, sum(map(len, STAGED)))]
    harness.run()
    _assert_answered(deep, experts, harness, router, STAGED)
    harness.assert_idle()


@pytest.mark.parametrize("layer", [3, -1])
@pytest.mark.parametrize("settled", [0, 1, 2, 3, 4])
def test_prompts_that_settle_leave_the_others_and_running_requests_as_they_are(
    deep, experts, settled, layer, native
):
    router = random_staged(deep, NAMES, STAGED, layer=layer, tap=2, settled=settled, pooling="mean_last")
    harness = Harness(deep, list(experts.values()), router=router, native=native, budget=Budget(256, 256))
    beside = prompt_ids(9, 20, VOCABULARY)
    harness.submit("beside", beside, {"e0": 0.75, "e2": 0.5}, LONG)
    harness.step()
    ran = _layers_run(harness)
    for i, prompt in enumerate(STAGED):
        harness.submit(f"r{i}", prompt, None, LONG)
    harness.submit("another", prompt_ids(10, 12, VOCABULARY), {"e1": 1.0}, LONG)
    harness.step()
    if native == "on":
        rows = dict(ran)
        assert rows[2] == 13 + sum(map(len, STAGED))
        left = (rows[3] - 13) if layer == 3 or settled < 4 else 0
        assert rows[4] == (13 if layer == 3 else rows[3])
        assert left in {sum(map(len, some)) for some in _subsets(STAGED, 4 - settled)}
    harness.run()
    _assert_answered(deep, experts, harness, router, STAGED)
    mix = [(experts["e0"], 0.75), (experts["e2"], 0.5)]
    assert harness.tokens("beside") == reference(materialised(deep, mix), beside, 16)
    harness.assert_idle()


def _subsets(prompts, count):
    return itertools.combinations(prompts, count)


def test_whoever_asks_for_features_gets_all_of_them_even_of_a_settled_prompt(deep, experts, native):
    router = random_staged(deep, NAMES, STAGED, layer=3, tap=1, settled=4)
    harness = Harness(deep, list(experts.values()), router=router, native=native, budget=Budget(256, 256))
    found: list[torch.Tensor] = []
    harness.submit("r0", STAGED[0], None, LONG)
    for prompt in STAGED[1:]:
        harness.engine.ask(Question(prompt, found.append))
    harness.run()
    plain = AutoModelForCausalLM.from_pretrained(deep, dtype=torch.float32).eval()
    expected = extract_features(plain, STAGED[1:], router.spec)
    torch.testing.assert_close(torch.stack(found), expected, rtol=1e-4, atol=1e-4)
    _assert_answered(deep, experts, harness, router, STAGED[:1])


def test_a_staged_router_decides_in_the_middle_of_a_prefill_too(deep, experts, native):
    router = random_staged(deep, NAMES, STAGED, layer=3, tap=1, settled=2)
    harness = Harness(
        deep, list(experts.values()), router=router, native=native, budget=Budget(256, 256), single_pass=True
    )
    for i, prompt in enumerate(STAGED):
        harness.submit(f"r{i}", prompt, None, LONG)
    harness.run()
    assert sum(stats.routed_requests for stats in harness.stats) == 0
    plain = AutoModelForCausalLM.from_pretrained(deep, dtype=torch.float32).eval()
    rows = router.probabilities(extract_features(plain, STAGED, router.spec))
    for i in range(len(STAGED)):
        gates = select_gates(rows[i], router.names, router.top_k, router.threshold)
        assert harness.finished(f"r{i}").routing.gates == gates
    harness.assert_idle()


@dataclass(frozen=True)
class Shy:
    """A router that abstains from prompts whose first feature is above a limit."""

    router: object
    limit: float

    def __getattr__(self, name: str) -> object:
        return getattr(self.router, name)

    def abstains(self, features: torch.Tensor) -> torch.Tensor:
        return features[:, 0] > self.limit


@pytest.mark.parametrize("single_pass", [False, True], ids=["own pass", "single pass"])
def test_what_the_router_abstains_from_is_answered_by_the_shared_expert_alone(deep, experts, single_pass):
    plain = AutoModelForCausalLM.from_pretrained(deep, dtype=torch.float32).eval()
    inner = random_router(deep, NAMES, layer=2)
    first = extract_features(plain, STAGED, inner.spec)[:, 0].sort()
    router = Shy(inner, float(first.values[1:3].mean()))
    harness = Harness(
        deep, list(experts.values()), router=router, budget=Budget(256, 256), single_pass=single_pass
    )
    for i, prompt in enumerate(STAGED):
        harness.submit(f"r{i}", prompt, None, LONG)
    ended = []
    while harness.engine.busy:
        ended += harness.step().ended
    for i, prompt in enumerate(STAGED):
        outcome = harness.finished(f"r{i}").routing
        strange = i in first.indices[2:].tolist()
        assert outcome.abstained == strange
        assert bool(outcome.gates) != strange
        assert set(outcome.scores) == set(NAMES)
        if strange:
            assert outcome.mode == "shared"
            assert harness.tokens(f"r{i}") == reference(plain, prompt, 16)
    metrics = Metrics(CollectorRegistry())
    for stats in ended:
        metrics.on_request(stats)
    assert metrics.registry.get_sample_value("twinserve_router_abstentions_total") == 2
    harness.assert_idle()


def test_a_request_may_insist_on_the_router_s_gates(deep, experts):
    router = Shy(random_router(deep, NAMES, layer=2), -1e9)
    harness = Harness(deep, list(experts.values()), router=router)
    dispatcher = harness.engine.dispatcher
    features: list[torch.Tensor] = []
    harness.engine.ask(Question(STAGED[0], features.append))
    harness.run()
    for abstain in (True, False):
        pattern, outcome = dispatcher.route(features[0], RoutingChoice(abstain=abstain))
        assert (outcome.abstained, not outcome.gates) == (abstain, abstain)
        harness.engine.release(pattern)
    harness.assert_idle()


def test_feedback_reads_all_layers_even_of_a_settled_prompt(deep, experts):
    router = random_staged(deep, NAMES, STAGED, layer=3, tap=1, settled=4)
    harness = Harness(deep, list(experts.values()), router=router)
    seen: list[torch.Tensor] = []

    class Watching:
        def decide(self, features, static, threshold, *, explore):
            seen.append(features)

    harness.engine.dispatcher.adjuster = Watching()
    harness.submit("r0", STAGED[0], None, LONG)
    harness.run()
    assert torch.isfinite(seen[0]).all()
    _assert_answered(deep, experts, harness, router, STAGED[:1])
