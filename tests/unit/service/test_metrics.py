import threading
from dataclasses import fields, replace
from typing import Any, get_args

from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from service.core import RequestStats, StepMode, StepStats
from service.metrics import OTHER, Metrics
from tests.unit.service.backend import gauges

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
    preemptions=2,
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
    assert value(metrics, "num_preemptions_total") == 2


def test_every_mode_of_a_step_is_there_before_its_first_step() -> None:
    metrics = made()
    for mode in get_args(StepMode):
        assert value(metrics, "steps_total", mode=mode) == 0
        metrics.on_step(replace(STEP, mode=mode))
        assert value(metrics, "steps_total", mode=mode) == 1


def test_an_ended_request_is_counted_by_its_reason() -> None:
    metrics = made()
    for reason in ("stop", "length", "cancelled", "timeout", "request_failed", "engine_dead"):
        metrics.on_request(request(reason))
    for reason, count in (("stop", 1), ("length", 1), ("abort", 1), ("timeout", 1), ("error", 2)):
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
    now: dict[str, Any] = {"running": 1, "kv_blocks_used": 25, "kv_blocks_total": 100}
    metrics.watch(lambda: gauges(**now))
    assert value(metrics, "num_requests_running") == 1
    now["running"] = 5
    assert value(metrics, "num_requests_running") == 5
    assert value(metrics, "kv_cache_usage_perc") == 0.25


def test_blocks_that_are_merely_cached_do_not_fill_the_cache() -> None:
    metrics = made()
    metrics.watch(lambda: gauges(kv_blocks_used=1, kv_blocks_cached=99, kv_blocks_total=100))
    assert value(metrics, "kv_cache_usage_perc") == 0.01
    assert value(metrics, "kv_blocks_cached") == 99


def test_an_empty_cache_is_not_a_division_by_zero() -> None:
    metrics = made()
    metrics.watch(lambda: gauges(alive=False))
    assert value(metrics, "kv_cache_usage_perc") == 0


def test_everything_in_the_engines_snapshot_is_told_under_a_name_of_its_own() -> None:
    names = {
        "running": "num_requests_running",
        "waiting": "num_requests_waiting",
        "kv_blocks_used": "kv_blocks_used",
        "kv_blocks_cached": "kv_blocks_cached",
        "kv_blocks_total": "kv_blocks",
        "prefix_queries": "prefix_cache_queries_total",
        "prefix_hits": "prefix_cache_hits_total",
        "experts_registered": "experts_registered",
        "experts_resident": "experts_resident",
        "experts_staged": "experts_staged",
        "expert_loads": "expert_loads_total",
        "expert_evictions": "expert_evictions_total",
        "expert_hits": "expert_slot_hits_total",
        "expert_misses": "expert_slot_misses_total",
        "merged_bytes": "merged_weight_bytes",
        "alive": "engine_up",
    }
    now = gauges(**{name: number for number, name in enumerate(names, 2)})
    metrics = made()
    metrics.watch(lambda: now)
    # The router's own figures are several: see test_generation_metrics.
    assert {field.name for field in fields(now)} == names.keys() | {"router"}
    for field, name in names.items():
        assert value(metrics, name) == getattr(now, field), name


def test_registering_asks_the_engine_nothing() -> None:
    def read() -> Any:
        raise AssertionError

    made().watch(read)


def test_the_names_of_vllm_are_there_under_our_prefix() -> None:
    metrics = made()
    metrics.watch(gauges)
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
            "prefix_cache_queries",
            "prefix_cache_hits",
            "num_preemptions",
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
