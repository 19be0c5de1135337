"""From the event loop: one terminal event always, nothing waits for ever, experts change under way."""

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from experts.bundle import Bundle
from service.core import Failed, Finished, GenerationRequest, RoutingChoice, SamplingParams, TextDelta
from service.engine.assembly import EngineOptions
from service.engine.model import ModelOptions
from service.errors import (
    ConflictError,
    ContextLengthError,
    DeadlineExceededError,
    EngineDeadError,
    InvalidRequestError,
    QueueFullError,
    ShuttingDownError,
    UnknownExpertError,
)
from service.runtime import LiveChange, Runtime, RuntimeConfig, open_runtime
from service.scheduler.policy import Limits
from tests.fixtures.tiny import VOCABULARY, tiny_family
from tests.model.harness import prompt_ids


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(tiny_family(tmp_path_factory.mktemp("family")).bundle)


class Recorder:
    """Keeps what the runtime reports."""

    def __init__(self) -> None:
        self.steps, self.requests = [], []

    def on_step(self, stats) -> None:
        self.steps.append(stats)

    def on_request(self, stats) -> None:
        self.requests.append(stats)


@asynccontextmanager
async def _open(
    bundle: Bundle, stats=None, max_batch: int = 32, engine: dict | None = None, **config
) -> AsyncIterator[Runtime]:
    options = EngineOptions(limits=Limits(max_batch), **engine or {})
    runtime = open_runtime(bundle, RuntimeConfig(options, dtype="float32", threads=1, **config), stats)
    try:
        yield runtime
    finally:
        await asyncio.to_thread(runtime.close)


def _request(name: str, gates=None, tokens: int = 12, seed: int = 1, **sampling) -> GenerationRequest:
    params = SamplingParams(max_tokens=tokens, **{"temperature": 0.0, "ignore_eos": True} | sampling)
    return GenerationRequest(name, prompt_ids(seed, 10, VOCABULARY), params, RoutingChoice(gates=gates))


async def _events(generation) -> list:
    return [event async for event in generation]


def _tokens(events) -> list[int]:
    return [token for event in events if isinstance(event, TextDelta) for token in event.token_ids]


def test_many_requests_at_once_all_end_and_are_counted(bundle):
    async def scenario() -> None:
        recorder = Recorder()
        async with _open(bundle, recorder, max_batch=4) as runtime:
            mixes = [None, {}, {"alpha": 1.0}, {"beta": 0.5, "gamma": 0.5}]
            generations = [runtime.submit(_request(f"r{i}", mixes[i % 4], seed=i % 4)) for i in range(24)]
            answers = await asyncio.gather(*(_events(g) for g in generations))
            for events in answers:
                assert isinstance(events[-1], Finished)
                assert len(_tokens(events)) == 12
            # The same request gives the same tokens, whoever else ran beside it.
            for i in range(4):
                assert len({tuple(_tokens(answers[j])) for j in range(i, 24, 4)}) == 1
            gauges = runtime.gauges()
            assert (gauges.running, gauges.waiting, gauges.kv_blocks_used) == (0, 0, 0)
            assert 0 < gauges.kv_blocks_cached <= gauges.kv_blocks_total
            assert (gauges.experts_registered, gauges.experts_resident) == (3, 3)
        assert len(recorder.requests) == 24
        assert sum(step.generated_tokens for step in recorder.steps) == 24 * 12
        assert {step.mode for step in recorder.steps} <= {"shared", "factored"}
        assert all(stats.first_token_seconds > 0 for stats in recorder.requests)

    asyncio.run(scenario())


def test_cancelling_ends_a_request_once_and_soon(bundle):
    async def scenario() -> None:
        async with _open(bundle) as runtime:
            generation = runtime.submit(_request("r", {"alpha": 1.0}, tokens=200))
            first = await anext(generation)
            generation.cancel()
            generation.cancel()
            rest = await _events(generation)
            assert isinstance(first, TextDelta)
            assert rest[-1].reason == "cancelled"
            assert rest[-1].usage.completion_tokens < 200
            generation.cancel()
            assert [s.leases for s in runtime.experts()] == [0, 0, 0]

    asyncio.run(scenario())


def test_a_full_queue_refuses_before_anything_is_queued(bundle):
    async def scenario() -> None:
        async with _open(bundle, max_batch=1, max_queue=1) as runtime:
            first = runtime.submit(_request("a", tokens=100))
            second = runtime.submit(_request("b"))
            with pytest.raises(QueueFullError, match="TWINSERVE_MAX_QUEUE") as caught:
                runtime.submit(_request("c"))
            assert caught.value.retry_after
            assert isinstance((await _events(first))[-1], Finished)
            assert isinstance((await _events(second))[-1], Finished)
            assert isinstance((await _events(runtime.submit(_request("c"))))[-1], Finished)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (GenerationRequest("r", (), SamplingParams(max_tokens=1)), InvalidRequestError, "no tokens"),
        (
            GenerationRequest("r", (VOCABULARY,), SamplingParams(max_tokens=1)),
            InvalidRequestError,
            r"\[0, 320\)",
        ),
        (GenerationRequest("r", (-1,), SamplingParams(max_tokens=1)), InvalidRequestError, r"-1\.\.-1"),
        (GenerationRequest("r", (5,) * 250, SamplingParams(max_tokens=7)), ContextLengthError, "257"),
        (_request("r", {"nobody": 1.0}), UnknownExpertError, "nobody"),
    ],
)
def test_what_cannot_run_is_refused_at_once(bundle, request_, error, message):
    async def scenario() -> None:
        async with _open(bundle) as runtime:
            with pytest.raises(error, match=message):
                runtime.submit(request_)
            assert runtime.gauges().waiting == 0

    asyncio.run(scenario())


def test_a_running_id_cannot_be_used_twice(bundle):
    async def scenario() -> None:
        async with _open(bundle) as runtime:
            first = runtime.submit(_request("same", tokens=50))
            with pytest.raises(ConflictError, match="same"):
                runtime.submit(_request("same"))
            assert isinstance((await _events(first))[-1], Finished)

    asyncio.run(scenario())


def test_a_dead_engine_hangs_nobody(bundle, monkeypatch):
    async def scenario() -> None:
        async with _open(bundle) as runtime:
            generations = [runtime.submit(_request(f"r{i}", tokens=100)) for i in range(3)]
            await anext(generations[0])

            def explode(*_):
                raise MemoryError("gone")

            monkeypatch.setattr(runtime._engine, "step", explode)
            for generation in generations:
                last = (await _events(generation))[-1]
                assert isinstance(last, Failed)
                assert isinstance(last.error, EngineDeadError)
            assert not runtime.alive
            assert not runtime.ready
            assert "gone" in runtime.failure
            with pytest.raises(EngineDeadError):
                runtime.submit(_request("late"))
            with pytest.raises(EngineDeadError):
                await runtime.route([(1, 2, 3)], RoutingChoice())
            with pytest.raises(EngineDeadError):
                await runtime.apply(LiveChange(retire=("alpha",)))

    asyncio.run(scenario())


def test_the_request_whose_failure_is_the_last_straw_still_gets_its_error(bundle, monkeypatch):
    async def scenario() -> None:
        async with _open(bundle) as runtime:

            def explode(*_):
                raise RuntimeError("no memory")

            monkeypatch.setattr(runtime._engine.model, "forward", explode)
            for i in range(8):
                last = (await _events(runtime.submit(_request(f"r{i}", {}))))[-1]
                assert isinstance(last, Failed)
            await asyncio.to_thread(runtime._thread._thread.join, 30)
            with pytest.raises(EngineDeadError, match="no memory"):
                runtime.submit(_request("late"))

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_command_that_fails_hangs_nobody_who_was_taken_in_with_it(bundle):
    async def scenario() -> None:
        async with _open(bundle) as runtime:

            def explode(_):
                raise ValueError("a bug")

            # The engine thread must find both at once, or it may be gone before the request is taken in.
            with runtime._thread._wake:
                runtime._thread.send(explode)
                generation = runtime.submit(_request("r"))
            with pytest.raises(EngineDeadError):
                await runtime.route([(5, 6, 7)], RoutingChoice())
            assert isinstance((await _events(generation))[-1], Failed)

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_requests_go_on_while_many_prompts_are_profiled(bundle):
    async def scenario() -> None:
        recorder = Recorder()
        async with _open(bundle, recorder) as runtime:
            decoding = runtime.submit(_request("d", {}, tokens=200))
            await anext(decoding)
            profiling = asyncio.create_task(
                runtime.features([prompt_ids(i, 60, VOCABULARY) for i in range(300)])
            )
            await asyncio.sleep(0)
            before = len(recorder.steps)
            fresh = runtime.submit(_request("new", {}, tokens=1))
            assert isinstance((await _events(fresh))[-1], Finished)
            assert not profiling.done()
            assert len(recorder.steps) - before < 20
            assert (await profiling).shape[0] == 300
            assert sum(step.routed_requests for step in recorder.steps) == 0

    asyncio.run(scenario())


def test_too_many_prompts_to_route_are_refused(bundle):
    async def scenario() -> None:
        async with _open(bundle, max_batch=2, max_queue=2) as runtime:
            with pytest.raises(QueueFullError, match="wait to be routed"):
                await runtime.route([(5, 6)] * 5, RoutingChoice())
            assert len(await runtime.route([(5, 6)] * 4, RoutingChoice())) == 4

    asyncio.run(scenario())


def test_draining_lets_running_requests_end_and_refuses_new_ones(bundle):
    async def scenario() -> None:
        async with _open(bundle) as runtime:
            running = runtime.submit(_request("r", tokens=30))
            draining = asyncio.create_task(runtime.drain(60))
            await asyncio.sleep(0)
            with pytest.raises(ShuttingDownError):
                runtime.submit(_request("late"))
            assert isinstance((await _events(running))[-1], Finished)
            await draining

    asyncio.run(scenario())


def test_a_drain_that_runs_out_of_time_ends_the_rest_with_an_error(bundle):
    async def scenario() -> None:
        async with _open(bundle) as runtime:
            running = runtime.submit(_request("r", tokens=240))
            await runtime.drain(0)
            last = (await _events(running))[-1]
            assert isinstance(last, Failed)
            assert isinstance(last.error, ShuttingDownError)

    asyncio.run(scenario())


def test_closing_ends_running_requests_with_an_error(bundle):
    async def scenario() -> None:
        async with _open(bundle) as runtime:
            running = runtime.submit(_request("r", tokens=240))
            await anext(running)
            await asyncio.to_thread(runtime.close)
            assert isinstance((await _events(running))[-1], Failed)

    asyncio.run(scenario())


def test_an_expert_is_replaced_and_retired_while_requests_hold_it(bundle):
    async def scenario() -> None:
        async with _open(bundle) as runtime:
            old = bundle.expert("alpha")
            new = type(old)("alpha", 2, bundle.expert("beta").factors, {})
            expected_old = _tokens(await _events(runtime.submit(_request("x", {"alpha": 1.0}, tokens=60))))
            expected_new = _tokens(await _events(runtime.submit(_request("y", {"beta": 1.0}, tokens=60))))
            holding = runtime.submit(_request("old", {"alpha": 1.0}, tokens=60))
            await anext(holding)
            await runtime.apply(LiveChange((new,), router=bundle.router()))
            after = runtime.submit(_request("new", {"alpha": 1.0}, tokens=60))
            states = {(s.name, s.generation): s.state for s in runtime.experts()}
            assert states[("alpha", 2)] == "active"
            await runtime.apply(LiveChange(retire=("beta",)))
            with pytest.raises(UnknownExpertError):
                runtime.submit(_request("none", {"beta": 1.0}))
            await runtime.apply(LiveChange(retire=("beta",)))
            events = await _events(holding)
            assert events[-1].routing.generations == {"alpha": 1}
            first = expected_old[0]
            assert [first, *_tokens(events)] == expected_old
            events = await _events(after)
            assert events[-1].routing.generations == {"alpha": 2}
            assert _tokens(events) == expected_new
            assert {(s.name, s.generation) for s in runtime.experts()} == {("alpha", 2), ("gamma", 1)}

    asyncio.run(scenario())


def test_whoever_gives_up_on_a_change_does_not_hurt_the_engine(bundle):
    async def scenario() -> None:
        async with _open(bundle) as runtime:
            release = threading.Event()
            running = runtime.submit(_request("r", {"alpha": 1.0}, tokens=20))
            await anext(running)
            runtime._thread.send(lambda _: release.wait(60))
            changing = asyncio.create_task(
                runtime.apply(LiveChange(retire=("beta",), router=bundle.router()))
            )
            while not runtime._changing.locked() or runtime._preparing._work_queue.qsize():
                await asyncio.sleep(0)
            for _ in range(20):
                await asyncio.sleep(0.001)
            changing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await changing
            release.set()
            assert isinstance((await _events(running))[-1], Finished)
            assert runtime.expert_names() == {"alpha", "beta", "gamma"}
            await runtime.apply(LiveChange(retire=("beta",), router=bundle.router()))
            assert runtime.expert_names() == {"alpha", "gamma"}
            assert runtime.alive

    asyncio.run(scenario())


def test_route_explains_without_generating(bundle):
    async def scenario() -> None:
        recorder = Recorder()
        async with _open(bundle, recorder) as runtime:
            prompts = [prompt_ids(i, 8, VOCABULARY) for i in range(3)]
            found = await runtime.route(prompts, RoutingChoice(top_k=1, threshold=0.0))
            assert [len(outcome.gates) for outcome in found] == [1, 1, 1]
            assert all(sum(outcome.scores.values()) == pytest.approx(1, abs=1e-5) for outcome in found)
            features = await runtime.features(prompts)
            assert features.shape[0] == 3
            named = await runtime.route(prompts, RoutingChoice(gates={"beta": 2.0}))
            assert [outcome.gates for outcome in named] == [{"beta": 2.0}] * 3
            assert not recorder.requests
            events = await _events(runtime.submit(_request("r", seed=0)))
            assert events[-1].routing.router_generation == bundle.router().generation
            assert [s.leases for s in runtime.experts()] == [0, 0, 0]

    asyncio.run(scenario())


def test_requests_wait_for_slots_and_are_woken_when_their_experts_have_come(bundle):
    async def scenario() -> None:
        async with _open(bundle) as runtime:
            expected = {}
            for name in ("alpha", "beta", "gamma"):
                expected[name] = _tokens(await _events(runtime.submit(_request(name, {name: 1.0}))))
        async with _open(bundle, max_experts=1) as runtime:
            assert sum(status.resident for status in runtime.experts()) == 1
            names = ["alpha", "beta", "gamma"] * 3
            generations = [runtime.submit(_request(f"{i}", {name: 1.0})) for i, name in enumerate(names)]
            answers = await asyncio.gather(*(_events(generation) for generation in generations))
            assert [_tokens(events) for events in answers] == [expected[name] for name in names]
            gauges = runtime.gauges()
            assert gauges.expert_evictions >= 2
            assert gauges.experts_resident == 1
            assert [status.leases for status in runtime.experts()] == [0, 0, 0]

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_only_pinned_experts_stay_when_slots_are_few(bundle):
    async def scenario() -> None:
        async with _open(bundle, max_experts=2, pinned_experts=("gamma",)) as runtime:
            for i, name in enumerate(["alpha", "beta", "alpha", "beta"]):
                await _events(runtime.submit(_request(f"{i}", {name: 1.0})))
                resident = {status.name for status in runtime.experts() if status.resident}
                assert resident == {name, "gamma"}

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_deadline_ends_a_request_that_waits_in_an_idle_looking_engine(bundle):
    async def scenario() -> None:
        async with _open(bundle, max_batch=1) as runtime:
            now = time.monotonic()
            first = runtime.submit(_request("first", tokens=200))
            late = replace(_request("late", {"alpha": 1.0}, tokens=200), deadline=now)
            events = await _events(runtime.submit(late))
            assert isinstance(events[-1].error, DeadlineExceededError)
            assert isinstance((await _events(first))[-1], Finished)

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_prompt_that_the_whole_cache_could_not_hold_is_refused_by_name(bundle):
    async def scenario() -> None:
        small = {"model": ModelOptions(kv_bytes=0, max_tokens=64)}
        async with _open(bundle, engine=small) as runtime:
            assert runtime.max_context == 64
            with pytest.raises(ContextLengthError, match="the context is 64"):
                runtime.submit(_request("r", tokens=60))

    asyncio.run(scenario())


@pytest.mark.parametrize("native", ["off", "auto"])
def test_a_closed_runtime_lets_go_of_weights_and_cache_and_keeps_its_last_gauges(bundle, native):
    async def scenario() -> Runtime:
        async with _open(bundle, engine={"model": ModelOptions(kv_bytes=2**20, native=native)}) as runtime:
            await _events(runtime.submit(_request("r", {"alpha": 1.0})))
            engine = runtime._engine
            held.extend(map(weakref.ref, (engine, engine.model, engine.model.cache, engine.model.model)))
            return runtime

    held: list[weakref.ref] = []
    runtime = asyncio.run(scenario())
    gc.collect()
    assert [reference() for reference in held] == [None] * 4
    assert runtime.gauges().running == 0
    assert not runtime.ready
    with pytest.raises(EngineDeadError, match="closed"):
        runtime.expert_names()
    runtime.close()
