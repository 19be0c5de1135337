from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from service.cli import unknown_variables
from service.engine.assembly import EngineOptions
from service.engine.model import ModelOptions
from service.engine.routing import RoutingDefaults
from service.runtime import RuntimeConfig
from service.scheduler.policy import Budget, Limits, Policy
from service.serve import runtime_config
from service.settings import Settings


def test_the_environment_sets_and_an_argument_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWINSERVE_PORT", "9001")
    monkeypatch.setenv("TWINSERVE_MAX_BATCH", "7")
    monkeypatch.setenv("TWINSERVE_LOG_LEVEL", "WARNING")
    settings = Settings(port=9002)
    assert (settings.port, settings.max_batch, settings.log_level) == (9002, 7, "warning")


def test_settings_cannot_change() -> None:
    with pytest.raises(ValidationError):
        Settings().port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", 65536),
        ("max_tokens", 0),
        ("max_gate", float("nan")),
        ("max_gate", float("inf")),
        ("router_threshold", 2),
        ("dtype", "int8"),
        ("keepalive_seconds", 0),
        ("collect_seconds", -1),
        ("collect_seconds", float("inf")),
        ("collect_seconds", 1e-6),
        ("collect_seconds", 9.99),
        ("keep_jobs_days", -1),
        ("keep_audit_days", 36501),
        ("kv_cache_bytes", 0),
        ("max_batch", 0),
        ("prefill_step", 15),
        ("prefill_chunk", 15),
        ("max_wait_seconds", 0),
        ("max_timeout_seconds", 0),
        ("max_timeout_seconds", float("inf")),
        ("max_logprobs", 21),
        ("max_active_experts", 0),
        ("max_experts", 0),
        ("max_expert_bytes", 0),
        ("host_cache_bytes", -1),
        ("merged_bytes", -1),
        ("mix_mode", "shared"),
        ("native", "yes"),
        ("requests_per_minute", 0),
        ("max_concurrent", 0),
        ("stream_backlog", 0),
        ("header_seconds", 0),
        ("cors_origins", "example.org"),
        ("cors_origins", "https://example.org/path"),
        ("no_such_setting", 1),
    ],
)
def test_an_impossible_value_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ValidationError, match=name):
        Settings(**{name: value})  # type: ignore[arg-type]


def test_collection_is_off_or_has_pauses() -> None:
    assert [Settings(collect_seconds=seconds).collect_seconds for seconds in (0, 10)] == [0, 10]
    with pytest.raises(ValidationError, match="too often; write 10 or more, or 0 for never"):
        Settings(collect_seconds=1)


def test_a_misspelt_variable_is_noticed() -> None:
    environment = {"TWINSERVE_PRT": "1", "TWINSERVE_PORT": "1", "PATH": "/bin"}
    assert unknown_variables(environment) == ["TWINSERVE_PRT"]


@pytest.mark.parametrize(
    ("together", "said"),
    [
        ({"mix_mode": "merged", "native": "off"}, "TWINSERVE_NATIVE"),
        ({"shared_weights": "int8", "native": "off"}, "TWINSERVE_NATIVE"),
        ({"shared_weights": "int8", "mix_mode": "merged"}, "TWINSERVE_MIX_MODE"),
        ({"mix_mode": "merged", "merged_bytes": 0}, "TWINSERVE_MERGED_BYTES"),
        ({"max_experts": 1, "pinned_experts": "a,b"}, "TWINSERVE_PINNED_EXPERTS"),
    ],
)
def test_settings_that_make_each_other_impossible_are_refused(together: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Settings(**together)


def test_what_is_switched_off_may_lie_idle() -> None:
    assert Settings(mix_mode="auto", native="off", merged_bytes=0)
    assert Settings(max_experts=2, pinned_experts="a,b,a")


def test_the_runtime_gets_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWINSERVE_PINNED_EXPERTS", "spell, stress,")
    config = runtime_config(
        Settings(
            max_batch=3,
            max_queue=4,
            max_context=128,
            router_top_k=2,
            router_threshold=0.25,
            prefill_step=64,
            prefill_chunk=32,
            kv_cache_bytes=2**20,
            prefix_cache=False,
            max_wait_seconds=2,
            max_active_experts=5,
            fair_share=False,
            mix_mode="merged",
            merged_bytes=2**21,
            single_pass=True,
            native="on",
            native_cache=Path("compiled"),
            pack_base=False,
            max_experts=6,
            max_expert_bytes=2**22,
            host_cache_bytes=2**23,
            device="cpu",
            dtype="float32",
            threads=2,
        )
    )
    assert config == RuntimeConfig(
        engine=EngineOptions(
            model=ModelOptions(
                kv_bytes=2**20,
                max_tokens=128,
                chunk_tokens=64,
                pack_base=False,
                native="on",
                native_cache=Path("compiled"),
            ),
            limits=Limits(3),
            budget=Budget(step_tokens=64, chunk_tokens=32),
            policy=Policy(max_wait_seconds=2, max_active_experts=5, fair_share=False),
            routing=RoutingDefaults(top_k=2, threshold=0.25),
            prefix_cache=False,
            mode="merged",
            merged_bytes=2**21,
            single_pass=True,
            host_cache_bytes=2**23,
        ),
        max_queue=4,
        device="cpu",
        dtype="float32",
        threads=2,
        max_experts=6,
        max_expert_bytes=2**22,
        pinned_experts=("spell", "stress"),
    )


@pytest.mark.parametrize(("step", "chunk"), [(64, 256), (256, 64)])
def test_the_cache_has_room_for_the_longest_prompt_part_of_any_step(step: int, chunk: int) -> None:
    config = runtime_config(Settings(prefill_step=step, prefill_chunk=chunk))
    assert config.engine.model.chunk_tokens == 256


def test_the_defaults_are_the_documented_ones() -> None:
    engine = runtime_config(Settings()).engine
    assert (engine.model.max_tokens, engine.model.kv_bytes, engine.merged_bytes) == (4096, 2**29, 2**29)
    assert (engine.mode, engine.prefix_cache, engine.single_pass) == ("auto", True, False)
