"""Experts are on the device before their requests begin, and stay there as long as these run."""

import threading
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experts.bundle import ExpertWeights
from experts.factors import SvdFactors
from service.core import ExpertKey, Pattern
from service.engine.host_cache import HostCache, copied
from service.engine.loader import Loader, loader_thread
from service.engine.residency import Residency
from service.errors import ExpertUnavailableError
from service.gating.resident import MatrixFactors, ResidentExpert
from service.gating.slots import SlotPool
from tests.fixtures.executors import HeldExecutor, InlineExecutor

NBYTES = 2 * 4 * 3 * 4
"""Bytes of the factors that `FakeBank.prepare` makes."""


def _key(name: str, generation: int = 1) -> ExpertKey:
    return ExpertKey(name, generation)


def _pattern(names: str) -> Pattern:
    return Pattern(tuple((_key(name), 1.0) for name in sorted(names)))


def _weights(key: ExpertKey) -> ExpertWeights:
    factors = SvdFactors(torch.ones(3, 4), torch.ones(4), torch.ones(4, 3))
    return ExpertWeights(key.name, key.generation, {"w": factors}, {})


class FakeBank:
    """A dictionary instead of a model."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.experts: dict[ExpertKey, ResidentExpert] = {}

    def prepare(self, weights: ExpertWeights) -> ResidentExpert:
        factors = weights.factors["w"]
        matrix = MatrixFactors(factors.Vh.clone(), factors.U.t().clone())
        return ResidentExpert(_key(weights.name, weights.generation), {"w": matrix}, {})

    def add(self, expert: ResidentExpert) -> None:
        self.experts[expert.key] = expert

    def remove(self, key: ExpertKey) -> None:
        self.experts.pop(key, None)


class FakeSource:
    """Makes experts up; those in `broken` cannot be had."""

    def __init__(self) -> None:
        self.broken: dict[ExpertKey, Exception] = {}
        self.asked: list[ExpertKey] = []

    def load(self, key: ExpertKey) -> ExpertWeights:
        self.asked.append(key)
        if key in self.broken:
            raise self.broken[key]
        return _weights(key)


class Desk:
    """Residency with everything around it."""

    def __init__(self, executor=None, host: HostCache | None = None, in_flight: int = 2, **limits) -> None:
        self.now = 0.0
        self.bank, self.source = FakeBank(), FakeSource()
        self.running: list[Pattern] = []
        self.executor = executor or InlineExecutor()
        self.loader = Loader(
            self.bank, self.source, self.executor, host=host, retry_seconds=4.0, clock=lambda: self.now
        )
        self.residency = Residency(
            self.bank,
            SlotPool(**limits),
            self.loader,
            lambda: iter(self.running),
            patience_seconds=5.0,
            in_flight=in_flight,
            clock=lambda: self.now,
        )

    def publish(self, name: str, generation: int = 1) -> bool:
        return self.residency.publish(self.bank.prepare(_weights(_key(name, generation))))

    def settle(self, *waiting: str, times: int = 1):
        for _ in range(times):
            settled = self.residency.settle([_pattern(names) for names in waiting])
            assert set(self.bank.experts) == set(self.residency.pool.keys())
        return settled

    def ready(self, names: str) -> bool:
        return self.residency.ready(_pattern(names))


def test_an_expert_is_fetched_when_a_request_waits_for_it():
    desk = Desk(max_experts=2)
    desk.settle("a")
    assert not desk.ready("a")
    settled = desk.settle("a")
    assert desk.ready("a")
    assert set(settled.loaded) == {_key("a")}
    assert desk.bank.experts[_key("a")].nbytes == NBYTES


def test_the_shared_expert_alone_is_always_ready():
    desk = Desk(HeldExecutor(), max_experts=1)
    desk.settle("", "a")
    assert desk.ready("")


def test_experts_of_running_sequences_never_lose_their_slots():
    desk = Desk(max_experts=2)
    desk.settle("ab", times=2)
    desk.running = [_pattern("a")]
    desk.settle("c", times=2)
    assert desk.ready("ac")
    desk.running = [_pattern("ac")]
    desk.settle("d", times=5)
    assert not desk.ready("d")
    assert set(desk.bank.experts) == {_key("a"), _key("c")}


def test_the_least_recently_used_expert_is_evicted():
    desk = Desk(max_experts=2)
    for name in "ab":
        desk.settle(name, times=2)
    desk.running = [_pattern("a")]
    desk.settle()
    desk.running = []
    desk.settle("c")
    assert desk.settle("c").evicted == (_key("b"),)
    assert desk.ready("a")


def test_loads_are_bounded_and_follow_the_line():
    held = HeldExecutor()
    desk = Desk(held, in_flight=2, max_experts=8)
    desk.settle("a", "b", "c", "d")
    desk.settle("a", "b", "c", "d")
    assert len(held.held) == 2
    held.run()
    desk.settle("a", "b", "c", "d")
    held.run()
    assert desk.source.asked == [_key(name) for name in "abcd"]


def test_one_load_serves_all_requests_that_wait_for_it():
    held = HeldExecutor()
    desk = Desk(held, max_experts=8)
    desk.settle("a", "ab", "a", times=3)
    held.run()
    assert Counter(desk.source.asked) == {_key("a"): 1, _key("b"): 1}


def test_the_engine_is_woken_when_a_load_ends_well_or_badly():
    held, woken = HeldExecutor(), []
    desk = Desk(held)
    desk.loader.on_loaded = lambda: woken.append(True)
    desk.source.broken[_key("b")] = OSError("gone")
    desk.settle("a", "b")
    assert desk.residency.loading
    assert not woken
    held.run()
    assert len(woken) == 2
    desk.settle()
    assert not desk.residency.loading


def test_a_load_that_nobody_waits_for_any_more_takes_only_a_free_slot():
    held = HeldExecutor()
    desk = Desk(held, max_experts=1)
    desk.publish("a")
    desk.settle("b")
    held.run()
    assert desk.settle().evicted == ()
    assert desk.ready("a")
    assert not desk.ready("b")


def test_a_mix_larger_than_the_pool_runs_alone_and_the_excess_is_reported():
    desk = Desk(max_experts=2)
    desk.publish("a")
    desk.running = [_pattern("a")]
    desk.settle("bcd", times=3)
    assert not desk.ready("bcd")
    desk.running = []
    desk.settle("bcd", times=6)
    assert desk.ready("bcd")
    assert desk.residency.pool.excess == (1, 0)
    desk.settle("bcd", times=3)
    assert len(desk.source.asked) == 3, "kept until its request has begun"
    desk.running = [_pattern("bcd")]
    desk.settle("a", times=3)
    assert not desk.ready("a")
    assert set(desk.bank.experts) == {_key(name) for name in "bcd"}
    desk.running = []
    desk.settle("a", times=3)
    assert desk.ready("a")
    assert desk.residency.pool.excess == (0, 0)


# -- failures ---------------------------------------------------------------------------------------


def test_an_expert_that_cannot_be_loaded_fails_its_requests_and_no_others(caplog):
    desk = Desk(max_experts=4)
    desk.source.broken[_key("x")] = OSError("/secret/path is gone")
    desk.settle("xa", "b")
    settled = desk.settle("xa", "b")
    assert set(settled.failed) == {_key("x")}
    error = settled.failed[_key("x")]
    assert "'x'" in error.message
    assert "secret" not in error.message
    assert "/secret/path is gone" in caplog.text
    desk.settle("b")
    assert desk.ready("b")
    assert desk.residency.stats.failures == 1


def test_a_failed_expert_is_left_alone_for_a_while_and_then_tried_again():
    desk = Desk()
    desk.source.broken[_key("x")] = OSError("gone")
    desk.settle("x", times=4)
    assert len(desk.source.asked) == 1
    with pytest.raises(ExpertUnavailableError) as refused:
        desk.residency.expect(_pattern("xa"))
    assert refused.value.retry_after == 4.0
    desk.residency.expect(_pattern("a"))
    desk.now = 4.0
    desk.source.broken.clear()
    desk.residency.expect(_pattern("x"))
    desk.settle("x", times=2)
    assert desk.ready("x")


def test_every_failure_doubles_the_pause_up_to_a_minute():
    desk = Desk()
    desk.source.broken[_key("x")] = OSError("gone")
    pauses = []
    for _ in range(7):
        desk.settle("x", times=2)
        with pytest.raises(ExpertUnavailableError) as refused:
            desk.residency.expect(_pattern("x"))
        pauses.append(refused.value.retry_after)
        desk.now += pauses[-1]
    assert pauses == [4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]


def test_a_source_that_gives_another_expert_is_not_believed():
    desk = Desk()
    desk.source.load = lambda key: _weights(_key("other"))
    desk.settle("x")
    assert set(desk.settle("x").failed) == {_key("x")}
    assert not desk.bank.experts


def test_a_cancelled_load_counts_as_failed():
    held = HeldExecutor()
    desk = Desk(held)
    desk.settle("a")
    held.held[0][0].cancel()
    assert set(desk.settle("a").failed) == {_key("a")}


# -- experts come and go ----------------------------------------------------------------------------


def test_a_published_expert_is_ready_at_once():
    desk = Desk(max_experts=1)
    assert desk.publish("a")
    assert desk.ready("a")
    assert desk.publish("b")
    assert not desk.ready("a")
    assert desk.residency.stats.evictions == 1


def test_a_published_expert_never_pushes_out_one_in_use_and_is_loaded_on_demand():
    desk = Desk(max_experts=1)
    desk.publish("a")
    desk.running = [_pattern("a")]
    assert not desk.publish("b")
    assert set(desk.bank.experts) == {_key("a")}
    desk.running = []
    desk.settle("b", times=2)
    assert desk.ready("b")


def test_a_publication_overtakes_a_load_of_the_same_generation_and_its_failure():
    held = HeldExecutor()
    desk = Desk(held)
    desk.settle("a")
    desk.publish("a")
    held.run()
    assert desk.settle("a").loaded == {}
    assert desk.ready("a")
    assert desk.source.asked == []


def test_publishing_a_failed_expert_ends_its_pause():
    desk = Desk()
    desk.source.broken[_key("x")] = OSError("gone")
    desk.settle("x", times=2)
    desk.publish("x")
    desk.residency.expect(_pattern("x"))
    assert desk.settle("x").failed == {}


@pytest.mark.parametrize("moment", ["loading", "loaded", "resident"])
def test_a_forgotten_generation_leaves_nothing_behind(moment):
    held = HeldExecutor()
    desk = Desk(held, host=HostCache(10 * NBYTES), max_experts=4)
    desk.settle("a")
    if moment != "loading":
        held.run()
    if moment == "resident":
        desk.settle("a")
    desk.residency.forget(_key("a"))
    held.run()
    desk.settle()
    assert not desk.bank.experts
    assert not desk.residency.loading
    assert (len(desk.residency.pool), desk.residency.pool.used_bytes) == (0, 0)
    desk.settle("a")
    assert len(held.held) == 1


def test_hits_and_misses_count_experts_of_queued_requests():
    desk = Desk()
    desk.publish("a")
    desk.residency.expect(_pattern("ab"))
    desk.residency.expect(_pattern(""))
    stats = desk.residency.stats
    assert (stats.hits, stats.misses) == (1, 1)


def test_loads_run_on_one_thread_with_one_torch_thread():
    seen = []

    class Source(FakeSource):
        def load(self, key):
            seen.append((threading.current_thread().name, torch.get_num_threads()))
            return super().load(key)

    woken = threading.Semaphore(0)
    with loader_thread() as executor:
        desk = Desk(executor)
        desk.loader._source = Source()
        desk.loader.on_loaded = woken.release
        desk.settle("a", "b")
        assert woken.acquire(timeout=30)
        assert woken.acquire(timeout=30)
        desk.settle("a", "b")
    assert desk.ready("ab")
    assert seen == [("twinserve-loader_0", 1)] * 2


# -- host memory ------------------------------------------------------------------------------------


def test_an_evicted_expert_comes_back_from_host_memory_without_its_source():
    desk = Desk(host=HostCache(10 * NBYTES), max_experts=1)
    desk.settle("a", times=2)
    first = desk.bank.experts[_key("a")]
    desk.settle("b", times=2)
    desk.settle("a", times=2)
    assert desk.source.asked == [_key("a"), _key("b")]
    assert torch.equal(desk.bank.experts[_key("a")].matrices["w"].a, first.matrices["w"].a)


def test_by_default_nothing_is_kept_in_host_memory():
    desk = Desk(max_experts=1)
    for name in "aba":
        desk.settle(name, times=2)
    assert desk.source.asked == [_key(name) for name in "aba"]


def test_host_memory_is_bounded_and_drops_the_least_recently_used():
    bank, cache = FakeBank(), HostCache(2 * NBYTES)
    experts = {name: bank.prepare(_weights(_key(name))) for name in "abc"}
    cache.put(experts["a"])
    cache.put(experts["b"])
    assert cache.get(_key("a")) is experts["a"]
    cache.put(experts["c"])
    assert [name for name in "abc" if _key(name) in cache] == ["a", "c"]
    assert cache.used_bytes == 2 * NBYTES
    cache.forget(_key("a"))
    assert cache.used_bytes == NBYTES


def test_an_expert_larger_than_host_memory_is_not_kept_and_drops_nobody():
    small, large = HostCache(NBYTES), FakeBank().prepare(_weights(_key("a")))
    small.put(large)
    cache = HostCache(NBYTES - 1)
    cache.put(large)
    assert _key("a") in small
    assert (cache.used_bytes, _key("a") in cache) == (0, False)


def test_a_copy_has_every_tensor_on_the_other_device():
    expert = ResidentExpert(
        _key("a"), {"w": MatrixFactors(torch.ones(2, 3), torch.ones(2, 4))}, {"bias": torch.ones(5)}
    )
    there = copied(expert, torch.device("meta"))
    tensors = [there.matrices["w"].a, there.matrices["w"].b, there.vectors["bias"]]
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert (there.key, there.nbytes) == (expert.key, expert.nbytes)


# -- under load -------------------------------------------------------------------------------------

NAMES = "abcdef"
REQUESTS = st.lists(
    st.tuples(st.integers(0, 30), st.frozensets(st.sampled_from(NAMES), max_size=3), st.integers(1, 6)),
    min_size=1,
    max_size=25,
)


@given(
    requests=REQUESTS,
    slots=st.integers(1, 5),
    places=st.integers(1, 4),
    pinned=st.frozensets(st.sampled_from(NAMES), max_size=2),
    in_flight=st.integers(1, 3),
)
def test_every_request_gets_its_turn_and_no_running_one_loses_an_expert(
    requests, slots, places, pinned, in_flight
):
    held = HeldExecutor()
    desk = Desk(held, max_experts=slots, pinned=pinned, in_flight=in_flight)
    coming = sorted((begin, "".join(sorted(names)), steps) for begin, names, steps in requests)
    waiting: list[tuple[str, int]] = []
    running: list[list] = []
    for step in range(2000):
        desk.now = float(step)
        while coming and coming[0][0] <= step:
            waiting.append(coming.pop(0)[1:])
        desk.running = [_pattern(names) for names, _ in running]
        desk.settle(*(names for names, _ in waiting))
        held.run(1)
        for entry in list(waiting):
            if len(running) < places and desk.ready(entry[0]):
                waiting.remove(entry)
                running.append(list(entry))
        needed = {_key(name) for names, _ in running for name in names}
        assert needed <= set(desk.bank.experts)
        if any(desk.residency.pool.excess):
            spare = [k.name for k in desk.bank.experts if k not in needed and k.name not in pinned]
            assert not spare or any(set(spare) <= set(names) for names, _ in waiting), "one mix at most"
        for entry in running:
            entry[1] -= 1
        running = [entry for entry in running if entry[1] > 0]
        if not (coming or waiting or running):
            break
    else:
        pytest.fail(f"starved: {waiting}")


def test_an_endless_stream_on_the_resident_experts_does_not_starve_another_one():
    desk = Desk(max_experts=2)
    desk.settle("a", "b", times=2)
    running = [["a", 3], ["b", 2]]
    for step in range(60):
        desk.now = float(step)
        desk.running = [_pattern(names) for names, _ in running]
        desk.settle("c", "a", "b")
        if desk.ready("c"):
            break
        running = [[names, left - 1] for names, left in running if left > 1]
        running += [[name, 3] for name in "ab" if desk.ready(name)]
    else:
        pytest.fail("starved")
    assert step >= 5


def test_a_step_costs_the_same_with_five_hundred_registered_experts():
    """Counted in looks at experts, so that a loaded machine cannot fail it."""

    def looks(registered: int) -> int:
        desk = Desk(max_experts=600)
        for i in range(registered):
            desk.residency.publish(desk.bank.prepare(_weights(_key(f"e{i}"))))
        count = 0

        class Counted(type(desk.residency.pool._held)):
            def __contains__(self, key):
                nonlocal count
                count += 1
                return super().__contains__(key)

            def __iter__(self):
                for key in super().__iter__():
                    nonlocal count
                    count += 1
                    yield key

        desk.residency.pool._held = Counted(desk.residency.pool._held)
        pattern = Pattern(((_key("e0"), 1.0), (_key("e1"), 1.0)))
        desk.running = [pattern] * 16
        desk.residency.settle([pattern] * 16)
        desk.residency.ready(pattern)
        return count

    assert looks(500) == looks(16)
