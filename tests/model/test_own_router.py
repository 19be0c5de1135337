"""Somebody else's kind of router, from a bundle on disk to tokens: nothing knows it but its own package."""

import json
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from experts.bundle import Bundle
from experts.errors import CorruptBundleError
from experts.inspection import bundle_facts, bundle_table
from experts.registry import describe_source, prepare_expert, profile_prompts, refit_router
from experts.routing import FeatureSpec, extract_features, load_prompts, render_prompts, select_gates
from service.core import SamplingParams
from tests.fixtures.bundles import with_expert, with_router
from tests.fixtures.nearest import NearestCentroid, install
from tests.fixtures.tiny import TinyFamily, tiny_family, tiny_lora, tiny_prompts
from tests.model.harness import Harness, materialised, reference

LONG = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
SPEC = FeatureSpec(pooling="mean", layer=1)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(install(tmp_path / "site"))


@pytest.fixture
def family(tmp_path: Path) -> TinyFamily:
    return tiny_family(tmp_path / "family", experts=("alpha", "beta"), router=False)


def _prompts(family: TinyFamily, name: str) -> list[str]:
    return [line.prompt for line in load_prompts(family.prompts[name])]


@pytest.fixture
def bundle(installed: None, family: TinyFamily) -> Bundle:
    """alpha and beta, and a nearest-centroid router over both."""
    bundle = Bundle.open(family.bundle)
    plain = AutoModelForCausalLM.from_pretrained(bundle.shared_path, dtype=torch.float32).eval()
    tokenizer = Harness(bundle.shared_path).tokenizer
    training = {
        name: extract_features(plain, render_prompts(tokenizer, _prompts(family, name)), SPEC)
        for name in bundle.expert_names()
    }
    return with_router(bundle, NearestCentroid.fit(training, SPEC))


def test_the_engine_routes_by_it_and_generates_with_its_gates(bundle, family):
    router = bundle.router()
    assert isinstance(router, NearestCentroid)
    assert all(entry.routed for entry in bundle.manifest.experts.values())
    experts = {name: bundle.expert(name) for name in bundle.expert_names()}
    harness = Harness(bundle.shared_path, list(experts.values()), router=router)
    prompts = {
        name: tuple(harness.tokenizer.encode(_prompts(family, name)[0])) for name in bundle.expert_names()
    }
    for name, prompt in prompts.items():
        harness.submit(name, prompt, None, LONG)
    harness.run()
    plain = AutoModelForCausalLM.from_pretrained(bundle.shared_path, dtype=torch.float32).eval()
    for name, prompt in prompts.items():
        outcome = harness.finished(name).routing
        row = router.probabilities(extract_features(plain, [prompt], SPEC))[0]
        assert max(outcome.gates, key=outcome.gates.__getitem__) == name
        assert outcome.gates == select_gates(row, router.names, router.top_k, router.threshold)
        assert outcome.router_generation == 1
        model = materialised(bundle.shared_path, [(experts[n], g) for n, g in outcome.gates.items()])
        assert harness.tokens(name) == reference(model, prompt, 12)
    harness.assert_idle()


def test_an_expert_joins_through_a_refit_of_its_kind(bundle, family, tmp_path):
    folder = tiny_lora(tmp_path / "lora", family.base, rank=2, seed=9)
    prompts = [line.prompt for line in load_prompts(tiny_prompts(tmp_path / "gamma.jsonl", "gamma"))]
    features, forms = profile_prompts(bundle, bundle.router(), prompts)
    router = refit_router(bundle.router(), "gamma", features, forms=forms)
    assert isinstance(router, NearestCentroid)
    compressed = prepare_expert(bundle, "gamma", folder)
    joined = with_router(with_expert(bundle, "gamma", compressed, describe_source(folder)), router)
    assert joined.router().names == ("alpha", "beta", "gamma")
    assert joined.router().probabilities(features).argmax(1).float().mean() > 1.9
    assert joined.router().without("gamma").names == ("alpha", "beta")


def test_inspection_tells_what_it_tells_of_itself(bundle):
    facts = bundle_facts(bundle)["router"]
    assert (facts["kind"], facts["generation"], facts["metric"]) == ("centroid", 1, "euclidean")
    assert json.dumps(facts)
    console = Console(record=True, width=200)
    console.print(bundle_table(bundle))
    assert (
        "centroid, generation 1, 2 experts, top_k=2, threshold=0.1, metric=euclidean" in console.export_text()
    )


def test_without_its_package_the_bundle_names_what_is_missing(bundle, monkeypatch):
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if Path(entry).name != "site"])
    with pytest.raises(CorruptBundleError, match=r"router kind 'centroid' is unknown"):
        Bundle.open(bundle.path)
