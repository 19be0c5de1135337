"""One bundle after another behind the same face: no request is lost, two at most, memory comes back."""

import asyncio
import gc
import threading
import weakref
from pathlib import Path

import pytest
import torch

from experts.bundle import Bundle, ExpertWeights
from experts.merging import TaskArithmetic
from service.core import Finished, GenerationRequest, RoutingChoice, SamplingParams
from service.engine.assembly import EngineOptions
from service.engine.change import LiveChange
from service.errors import ConflictError, ExpertRejectedError, ShuttingDownError, StorageFullError
from service.runtime import Generation, Runtime, RuntimeConfig, RuntimeSwitch, open_runtime
from service.runtime.memory import available_bytes
from service.scheduler.policy import Limits
from tests.fixtures.tiny import VOCABULARY, tiny_family
from tests.model.harness import materialised, prompt_ids, reference


@pytest.fixture(scope="module")
def blue(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(tiny_family(tmp_path_factory.mktemp("blue")).bundle)


@pytest.fixture(scope="module")
def green(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same base and fine-tunes, merged differently."""
    return Bundle.open(tiny_family(tmp_path_factory.mktemp("green"), method=TaskArithmetic(scale=0.7)).bundle)


def _opened(bundle: Bundle, rows: int = 4) -> Runtime:
    options = EngineOptions(limits=Limits(rows))
    return open_runtime(bundle, RuntimeConfig(options, dtype="float32", threads=1))


def _renumbered(bundle: Bundle, name: str, generation: int) -> ExpertWeights:
    weights = bundle.expert(name)
    return ExpertWeights(name, generation, weights.factors, weights.exact)


def _request(name: str, gates, tokens: int = 40, seed: int = 1) -> GenerationRequest:
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    return GenerationRequest(name, prompt_ids(seed, 10, VOCABULARY), params, RoutingChoice(gates=gates))


async def _held(switch: RuntimeSwitch, request: GenerationRequest) -> tuple[Generation, threading.Event]:
    """A request that has begun, and stands still until the event is set."""
    generation = switch.submit(request)
    await anext(generation)
    release = threading.Event()
    switch.runtime._thread.send(lambda _: release.wait(60))
    return generation, release


async def _answer(switch: RuntimeSwitch, request: GenerationRequest) -> tuple[list[int], Finished]:
    events = [event async for event in switch.submit(request)]
    assert isinstance(events[-1], Finished), events[-1]
    return [token for event in events[:-1] for token in event.token_ids], events[-1]


def _truth(bundle: Bundle, finished: Finished, seed: int, tokens: int = 40) -> list[int]:
    mix = [(bundle.expert(name), gate) for name, gate in finished.routing.gates.items()]
    return reference(materialised(bundle.shared_path, mix), prompt_ids(seed, 10, VOCABULARY), tokens)


def test_requests_go_on_over_a_swap_and_none_is_lost(blue, green):
    async def scenario() -> None:
        switch = RuntimeSwitch(_opened(blue))
        first = switch.runtime
        try:
            running = [switch.submit(_request(f"old{i}", {"alpha": 1.0}, 120, i)) for i in range(8)]
            await anext(running[0])
            swapping = asyncio.create_task(switch.swap(lambda: _opened(green)))
            meanwhile, number = [], 0
            while not swapping.done():
                meanwhile.append(
                    asyncio.create_task(_answer(switch, _request(f"m{number}", {"beta": 1.0}, 4)))
                )
                number += 1
                await asyncio.wait([swapping], timeout=0.05)
            await swapping
            assert switch.runtime is not first
            tokens, finished = await _answer(switch, _request("new", {"alpha": 1.0}, seed=3))
            assert tokens == _truth(green, finished, 3)
            for i, generation in enumerate(running):
                events = [event async for event in generation]
                assert isinstance(events[-1], Finished)
                begun = [1] if i == 0 else []
                made = len(begun) + sum(len(event.token_ids) for event in events[:-1])
                assert made == 120
            for tokens, _ in await asyncio.gather(*meanwhile):
                assert len(tokens) == 4
            await switch.left()
            assert switch.settled
            assert not first.alive
        finally:
            await asyncio.to_thread(switch.close)

    asyncio.run(scenario())


def test_an_answer_that_began_before_a_swap_is_the_old_bundle_s_to_its_end(blue, green):
    async def scenario() -> None:
        switch = RuntimeSwitch(_opened(blue))
        try:
            held, release = await _held(switch, _request("old", {"alpha": 1.0}, 60, 5))
            await switch.swap(lambda: _opened(green))
            new, _ = await _answer(switch, _request("new", {"alpha": 1.0}, 60, 5))
            release.set()
            *rest, finished = [event async for event in held]
            truth = _truth(blue, finished, 5, 60)
            assert [token for event in rest for token in event.token_ids] == truth[1:]
            assert new != truth
        finally:
            await asyncio.to_thread(switch.close)

    asyncio.run(scenario())


def test_the_old_weights_are_gone_after_its_last_request(blue, green):
    async def scenario() -> None:
        switch = RuntimeSwitch(_opened(blue))
        try:
            weights = weakref.ref(switch.runtime._engine.model)
            old = LiveChange((_renumbered(blue, "alpha", 7),), router=blue.router())
            await switch.apply(old)
            held, release = await _held(switch, _request("held", {"alpha": 1.0}, 200))
            await switch.swap(lambda: _opened(green))
            assert not switch.settled
            statuses = [(it.name, it.generation, it.state, it.leases) for it in switch.experts()]
            assert ("alpha", 7, "retired", 1) in statuses
            assert sum(state == "active" for _, _, state, _ in statuses) == 3
            assert weights() is not None
            release.set()
            _ = [event async for event in held]
            await switch.left()
            gc.collect()
            assert weights() is None
        finally:
            await asyncio.to_thread(switch.close)

    asyncio.run(scenario())


def test_totals_go_on_over_a_swap_and_what_runs_is_counted_together(blue, green):
    async def scenario() -> None:
        switch = RuntimeSwitch(_opened(blue))
        try:
            await _answer(switch, _request("one", {"alpha": 1.0}))
            before = switch.gauges()
            assert before.expert_hits == 1
            held, release = await _held(switch, _request("held", {"beta": 1.0}, 200))
            await switch.swap(lambda: _opened(green))
            during = switch.gauges()
            assert during.expert_hits == 2
            assert during.experts_registered == 3
            assert during.experts_resident == 6
            assert during.running == 1
            assert during.kv_blocks_total == 2 * before.kv_blocks_total
            release.set()
            _ = [event async for event in held]
            await switch.left()
            await _answer(switch, _request("two", {"alpha": 1.0}))
            after = switch.gauges()
            assert after.expert_hits == 3
            assert after.prefix_queries > during.prefix_queries
            assert after.kv_blocks_total == before.kv_blocks_total
        finally:
            await asyncio.to_thread(switch.close)

    asyncio.run(scenario())


def test_changes_reach_the_bundle_that_serves(blue, green):
    async def scenario() -> None:
        switch = RuntimeSwitch(_opened(blue))
        try:
            await switch.swap(lambda: _opened(green))
            await switch.apply(LiveChange(retire=("gamma",), router=green.router()))
            assert switch.expert_names() == {"alpha", "beta"}
            found = await switch.route([prompt_ids(1, 9, VOCABULARY)], RoutingChoice())
            assert set(found[0].scores) == {"alpha", "beta"}
        finally:
            await asyncio.to_thread(switch.close)

    asyncio.run(scenario())


def test_the_new_runtime_computes_with_as_many_threads_as_the_old_one(blue, green):
    def opened(bundle: Bundle) -> Runtime:
        return open_runtime(bundle, RuntimeConfig(EngineOptions(limits=Limits(4)), dtype="float32"))

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first = opened(blue)
    finally:
        torch.set_num_threads(before)

    async def scenario() -> None:
        switch = RuntimeSwitch(first)
        try:
            await switch.swap(lambda: opened(green))
            assert switch.runtime.threads == first.threads == 2
        finally:
            await asyncio.to_thread(switch.close)

    asyncio.run(scenario())


def test_without_memory_for_two_nothing_is_opened(blue):
    async def scenario() -> None:
        switch = RuntimeSwitch(_opened(blue), available=lambda: 1 << 16)
        opened = []
        try:
            with pytest.raises(StorageFullError, match=r"needs about \d+ MiB .* 0 MiB are left"):
                await switch.swap(lambda: opened.append(1))
            assert opened == []
            assert len((await _answer(switch, _request("r", {})))[0]) == 40
        finally:
            await asyncio.to_thread(switch.close)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"context": 128}, "context"), ({"template": "{{ messages[0].content }}"}, "chat template")],
)
def test_a_bundle_over_another_base_is_refused_and_closed(blue, tmp_path: Path, options, message):
    other = Bundle.open(tiny_family(tmp_path, experts=("alpha",), router=False, **options).bundle)

    async def scenario() -> None:
        switch = RuntimeSwitch(_opened(blue))
        first, opened = switch.runtime, []

        def open_new() -> Runtime:
            opened.append(_opened(other))
            return opened[0]

        try:
            with pytest.raises(ExpertRejectedError, match=message):
                await switch.swap(open_new)
            assert switch.runtime is first
            assert not opened[0].alive
            assert switch.settled
        finally:
            await asyncio.to_thread(switch.close)

    asyncio.run(scenario())


def test_a_bundle_that_cannot_be_opened_leaves_the_old_one_serving(blue):
    def broken() -> Runtime:
        raise ExpertRejectedError("no")

    async def scenario() -> None:
        switch = RuntimeSwitch(_opened(blue))
        try:
            with pytest.raises(ExpertRejectedError, match="no"):
                await switch.swap(broken)
            assert len((await _answer(switch, _request("r", {})))[0]) == 40
        finally:
            await asyncio.to_thread(switch.close)

    asyncio.run(scenario())


def test_never_three_at_once(blue, green):
    async def scenario() -> None:
        switch = RuntimeSwitch(_opened(blue))
        try:
            held, release = await _held(switch, _request("held", {"alpha": 1.0}, 200))
            await switch.swap(lambda: _opened(green))
            opened = []

            def third() -> Runtime:
                opened.append(switch.settled)
                return _opened(blue)

            again = asyncio.create_task(switch.swap(third))
            with pytest.raises(ConflictError, match="is running"):
                switch.submit(_request("held", {}))
            assert opened == []
            release.set()
            _ = [event async for event in held]
            await again
            assert opened == [True]
        finally:
            await asyncio.to_thread(switch.close)

    asyncio.run(scenario())


def test_memory_that_a_runtime_on_its_way_out_gives_back_is_room_for_the_next(blue, green):
    async def scenario() -> None:
        left = 1 << 40
        switch = RuntimeSwitch(_opened(blue), available=lambda: left)
        try:
            held, release = await _held(switch, _request("held", {"alpha": 1.0}, 200))
            await switch.swap(lambda: _opened(green))
            left = switch.runtime.nbytes // 4
            switch.check_room()
            release.set()
            _ = [event async for event in held]
            await switch.left()
            with pytest.raises(StorageFullError, match="are left"):
                switch.check_room()
        finally:
            await asyncio.to_thread(switch.close)

    asyncio.run(scenario())


def test_a_shutdown_in_the_middle_of_a_swap_closes_both(blue, green):
    async def scenario() -> None:
        switch = RuntimeSwitch(_opened(blue))
        begun, drained = threading.Event(), threading.Event()
        opened = []

        def open_new() -> Runtime:
            begun.set()
            drained.wait(60)
            opened.append(_opened(green))
            return opened[0]

        swapping = asyncio.create_task(switch.swap(open_new))
        while not begun.is_set():
            await asyncio.sleep(0.005)
        await switch.drain(0)
        drained.set()
        with pytest.raises(ShuttingDownError):
            await swapping
        await asyncio.to_thread(switch.close)
        assert not opened[0].alive
        assert not switch.alive

    asyncio.run(scenario())


def test_what_can_be_had_is_the_least_that_machine_and_group_allow(tmp_path: Path, monkeypatch):
    machine = tmp_path / "meminfo"
    machine.write_text("MemTotal:       1000 kB\nMemAvailable:    500 kB\n")
    cpu = torch.device("cpu")
    groups = tmp_path / "groups"
    groups.mkdir()
    assert available_bytes(cpu, machine=machine, groups=groups) == 500 * 1024
    (groups / "memory.max").write_text("300000\n")
    (groups / "memory.current").write_text("200000\n")
    (groups / "memory.stat").write_text("anon 5\ninactive_file 50000\n")
    assert available_bytes(cpu, machine=machine, groups=groups) == 150_000
    (groups / "memory.max").write_text("max\n")
    assert available_bytes(cpu, machine=machine, groups=groups) == 500 * 1024
    assert available_bytes(cpu, machine=tmp_path / "none", groups=tmp_path / "none") is None
