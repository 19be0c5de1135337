"""What is told about a router."""

import json

import pytest
import torch

from experts.errors import RoutingError
from experts.evaluation.routing_report import calibration_error, routing_report
from experts.routing import FeatureSpec
from experts.routing.gaussian import GaussianRouter
from tests.unit.routing.prompts_like import clusters, far_off


@pytest.fixture(scope="module")
def router() -> GaussianRouter:
    spec = FeatureSpec(pooling="mean")
    return GaussianRouter.fit(clusters(40, 1, noise=2.0), clusters(40, 2, noise=2.0), spec, guard_rate=0.02)


def test_the_report_counts_every_prompt_once(router):
    report = routing_report(router, clusters(50, 3, noise=2.0), {"noise": far_off(50, 4)})
    assert [sum(row) for row in report.confusion] == [50, 50, 50]
    right = [report.confusion[i][i] / 50 for i in range(3)]
    assert report.accuracy == pytest.approx(sum(right) / 3)
    assert report.routed_right <= report.accuracy
    assert report.detected["noise"] > 0.8 > 0.2 > report.false_abstention
    assert report.milliseconds > 0
    assert json.loads(json.dumps(report.to_json()))["kind"] == "gaussian"


def test_experts_that_shadow_one_another_are_named_largest_first(router):
    features = clusters(50, 3, noise=2.0)
    features["a"] = torch.cat([features["a"][:30], clusters(20, 5, noise=0.1)["c"]])
    report = routing_report(router, features)
    assert (report.shadows[0].expert, report.shadows[0].taken_by) == ("a", "c")
    assert report.shadows[0].share >= 0.4
    assert "| a |" in report.to_markdown()
    assert "c (" in report.to_markdown()


def test_calibration_error_is_the_gap_between_confidence_and_accuracy():
    right = torch.tensor([True] * 6 + [False] * 4)
    assert calibration_error(torch.full((10,), 0.95), right) == pytest.approx(0.35, abs=1e-5)
    assert calibration_error(torch.full((10,), 0.6), right) == pytest.approx(0, abs=1e-5)


def test_an_expert_that_the_router_does_not_know_is_refused(router):
    with pytest.raises(RoutingError, match=r"\['z'\]"):
        routing_report(router, {"z": torch.zeros(1, 8)})
