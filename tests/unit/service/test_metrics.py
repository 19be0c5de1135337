import threading

from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from service.core import EngineGauges, RequestStats, StepStats
from service.metrics import OTHER, Metrics

STEP = StepStats(
    mode="factored",
    seconds=0.02,
    decode_rows=3,
    prefill_tokens=40,
    generated_tokens=4,
    active_experts=2,
    patterns=3,
    rebuilt=True,
    inter_token_seconds=(0.02, 0.03, 0.04),
    routed_requests=2,
    route_seconds=0.01,
)


def request(reason: str = "stop", **gates: float) -> RequestStats:
    return RequestStats(reason, 5, 7, 0.1, None, 0.2, 0.3, 0.25, 0.6, gates)


def made(**options: int) -> Metrics:
    return Metrics(CollectorRegistry(), **options)


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"twinserve_{name}", labels)


def test_a_step_is_counted_once() -> None:
    metrics = made()
    metrics.on_step(STEP)
    assert value(metrics, "steps_total", mode="factored") == 1
    assert value(metrics, "steps_total", mode="shared") == 0
    assert value(metrics, "prompt_tokens_total") == 40
    assert value(metrics, "generation_tokens_total") == 4
    assert value(metrics, "inter_token_latency_seconds_count") == 3
    assert value(metrics, "step_active_experts_sum") == 2
    assert value(metrics, "step_patterns_sum") == 3
    assert value(metrics, "working_set_rebuilds_total") == 1
    assert value(metrics, "routed_requests_total") == 2


def test_an_ended_request_is_counted_by_its_reason() -> None:
    metrics = made()
    for reason in ("stop", "length", "cancelled", "request_failed", "engine_dead"):
        metrics.on_request(request(reason))
    for reason, count in (("stop", 1), ("length", 1), ("abort", 1), ("error", 2)):
        assert value(metrics, "request_success_total", finished_reason=reason) == count


def test_a_stage_that_was_not_reached_is_not_observed() -> None:
    metrics = made()
    metrics.on_request(request())
    assert value(metrics, "router_seconds_count") == 0
    assert value(metrics, "time_to_first_token_seconds_sum") == 0.25
    assert value(metrics, "request_queue_time_seconds_count") == 1


def test_gate_mass_is_absolute_and_its_labels_are_bounded() -> None:
    metrics = made(expert_labels=2)
    metrics.on_request(request(a=0.5, b=-0.5))
    metrics.on_request(request(a=0.5, c=1.0, d=2.0))
    assert value(metrics, "gate_weight_mass_total", expert="a") == 1
    assert value(metrics, "gate_weight_mass_total", expert="b") == 0.5
    assert value(metrics, "gate_weight_mass_total", expert=OTHER) == 3
    assert value(metrics, "gate_weight_mass_total", expert="c") is None


def test_gauges_are_read_when_scraped() -> None:
    metrics = made()
    running = [1]
    metrics.watch(lambda: EngineGauges(running[0], 2, 1, 8, 25, 100, 3, 4, True))
    assert value(metrics, "num_requests_running") == 1
    running[0] = 5
    assert value(metrics, "num_requests_running") == 5
    assert value(metrics, "kv_cache_usage_perc") == 0.25
    assert value(metrics, "experts_resident") == 4


def test_the_cache_is_full_when_either_its_rows_or_its_tokens_are() -> None:
    for rows, tokens, share in ((8, 25, 1.0), (1, 100, 1.0), (2, 90, 0.9), (4, 10, 0.5)):
        metrics = made()
        metrics.watch(lambda rows=rows, tokens=tokens: EngineGauges(1, 0, rows, 8, tokens, 100, 3, 4, True))
        assert value(metrics, "kv_cache_usage_perc") == share


def test_an_empty_cache_is_not_a_division_by_zero() -> None:
    metrics = made()
    metrics.watch(lambda: EngineGauges(0, 0, 0, 0, 0, 0, 0, 0, False))
    assert value(metrics, "kv_cache_usage_perc") == 0


def test_the_names_of_vllm_are_there_under_our_prefix() -> None:
    metrics = made()
    metrics.watch(lambda: EngineGauges(0, 0, 0, 1, 0, 1, 0, 0, True))
    body, _ = metrics.exposition("")
    names = {family.name for family in text_string_to_metric_families(body.decode())}
    assert names >= {
        f"twinserve_{stem}"
        for stem in (
            "time_to_first_token_seconds",
            "inter_token_latency_seconds",
            "e2e_request_latency_seconds",
            "request_queue_time_seconds",
            "request_prefill_time_seconds",
            "request_decode_time_seconds",
            "num_requests_running",
            "num_requests_waiting",
            "kv_cache_usage_perc",
            "prompt_tokens",
            "generation_tokens",
            "request_success",
        )
    }


def test_two_registries_do_not_meet() -> None:
    one, other = made(), made()
    one.on_step(STEP)
    assert value(other, "steps_total", mode="factored") == 0


def test_threads_may_record_together() -> None:
    metrics = made(expert_labels=4)

    def record() -> None:
        for index in range(200):
            metrics.on_step(STEP)
            metrics.on_request(request(**{f"e{index % 6}": 1.0}))

    threads = [threading.Thread(target=record) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert value(metrics, "steps_total", mode="factored") == 800
    mass = [
        sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "twinserve_gate_weight_mass_total"
    ]
    assert len(mass) == 5
    assert sum(mass) == 800
