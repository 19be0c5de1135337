"""What an operator compares generations and trials by, and what shows that the router drifts."""

import math

from prometheus_client import CollectorRegistry

from service.core import ExpertKey, RequestStats, RouterBaseline, RouteStats, ShadowStats, StepStats
from service.generation_metrics import GENERATIONS
from service.metrics import OTHER, Metrics
from tests.unit.service.backend import gauges


def made(**options: int) -> Metrics:
    return Metrics(CollectorRegistry(), **options)


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"twinserve_{name}", labels)


def ended(reason: str = "stop", tokens: int = 7, **generations: int) -> RequestStats:
    gates = dict.fromkeys(generations, 1.0)
    return RequestStats(reason, 5, tokens, 0.1, None, 0.2, 0.3, 0.25, 0.6, gates, generations=generations)


def step(*routes: RouteStats) -> StepStats:
    return StepStats("factored", 0.02, 1, 0, 1, 1, 1, False, (), routes=routes)


def test_generations_of_one_expert_are_counted_apart() -> None:
    metrics = made()
    metrics.on_request(ended(a=1))
    metrics.on_request(ended(a=1, tokens=3))
    metrics.on_request(ended("cancelled", a=2, b=1))
    one, two = {"expert": "a", "generation": "1"}, {"expert": "a", "generation": "2"}
    assert value(metrics, "expert_requests_total", **one, finished_reason="stop") == 2
    assert value(metrics, "expert_requests_total", **two, finished_reason="abort") == 1
    assert value(metrics, "expert_tokens_total", **one) == 10
    assert value(metrics, "expert_request_seconds_count", **one) == 2
    assert value(metrics, "expert_request_seconds_sum", **two) == 0.6
    assert value(metrics, "expert_first_token_seconds_sum", **one) == 0.5
    assert value(metrics, "expert_tokens_total", expert="b", generation="1") == 7


def test_only_the_generations_used_last_are_shown() -> None:
    metrics = made()
    for number in range(1, 40):
        metrics.on_request(ended(a=number))
        metrics.on_request(ended(a=1))
        metrics.on_step(step(RouteStats(0.5, False, trial=ExpertKey("a", number))))
    shown = {
        sample.labels["generation"]
        for family in metrics.registry.collect()
        for sample in family.samples
        if "generation" in sample.labels
    }
    assert len(shown) == GENERATIONS
    assert {"1", "39"} <= shown
    assert value(metrics, "expert_requests_total", expert="a", generation="1", finished_reason="stop") == 40


def test_experts_beyond_the_first_share_a_label() -> None:
    metrics = made(expert_labels=1)
    metrics.on_request(ended(a=1))
    metrics.on_request(ended(b=7, c=9))
    assert value(metrics, "expert_tokens_total", expert=OTHER, generation=OTHER) == 14


def test_trials_are_counted_by_kind_and_compared() -> None:
    metrics = made()
    key = ExpertKey("a", 3)
    metrics.on_step(
        step(
            RouteStats(0.9, False, trial=key),
            RouteStats(0.8, False, shadow=ShadowStats(key, True, 0.0)),
            RouteStats(0.7, True, shadow=ShadowStats(key, False, 0.4)),
            RouteStats(0.6, False),
        )
    )
    labels = {"expert": "a", "generation": "3"}
    assert value(metrics, "trial_requests_total", **labels, kind="canary") == 1
    assert value(metrics, "trial_requests_total", **labels, kind="shadow") == 2
    assert value(metrics, "trial_agreements_total", **labels) == 1
    assert value(metrics, "trial_gate_difference_sum", **labels) == 0.4
    assert value(metrics, "trial_gate_difference_bucket", **labels, le="0.0") == 1


def test_drift_stands_beside_what_the_router_was_fitted_to_expect() -> None:
    metrics = made()
    metrics.on_step(step(RouteStats(0.9, False, -0.2), RouteStats(0.5, True, 4.5), RouteStats(0.7, False)))
    assert value(metrics, "router_confidence_count") == 3
    assert value(metrics, "router_confidence_sum") == 0.9 + 0.5 + 0.7
    assert value(metrics, "router_distance_count") == 2
    assert value(metrics, "router_distance_bucket", le="1.0") == 1
    metrics.watch(
        lambda: gauges(
            router=RouterBaseline(4, 3, abstention=0.01, threshold=2.5, accuracy=0.97), experts_staged=2
        )
    )
    assert value(metrics, "router_generation") == 4
    assert value(metrics, "router_fitted_accuracy") == 0.97
    assert value(metrics, "router_fitted_abstention_ratio") == 0.01
    assert value(metrics, "router_distance_threshold") == 2.5
    assert value(metrics, "experts_staged") == 2


def test_what_a_router_does_not_say_is_not_a_number() -> None:
    metrics = made()
    metrics.watch(lambda: gauges(router=None))
    assert value(metrics, "router_generation") == 0
    assert math.isnan(value(metrics, "router_fitted_accuracy"))
    assert math.isnan(value(metrics, "router_distance_threshold"))
