"""Whatever comes in whatever order: no block is lost, nobody sees another's keys, everybody ends."""

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from service.core import ExpertKey, Pattern
from service.scheduler.policy import Budget, Policy
from service.scheduler.sequence import Sequence
from tests.unit.scheduler import fakes

PATTERNS = [
    Pattern(),
    Pattern(),
    fakes.pattern("a"),
    fakes.pattern("a"),
    fakes.pattern("a", weight=0.5),
    fakes.pattern("a@2"),
    fakes.pattern("a", "b"),
    fakes.pattern("c"),
]
WINDOWS = [(None,), (20,), (None, 20), (None, 40, 1)]


class Serving(RuleBasedStateMachine):
    """A server under random load, with a memory that knows what every block holds."""

    @initialize(
        windows=st.sampled_from(WINDOWS),
        blocks=st.integers(6, 24),
        max_running=st.integers(1, 8),
        chunk=st.integers(1, 40),
        prefix_cache=st.booleans(),
        fair=st.booleans(),
        bound=st.sampled_from([None, 1, 2]),
        max_wait=st.sampled_from([0.0, 5.0, 1e9]),
    )
    def start(self, windows, blocks, max_running, chunk, prefix_cache, fair, bound, max_wait):
        self.absent: set[Pattern] = set()
        self.scheduler = fakes.scheduler(
            blocks,
            max_running=max_running,
            budget=Budget(step_tokens=50, chunk_tokens=chunk),
            policy=Policy(max_wait_seconds=max_wait, max_active_experts=bound, fair_share=fair),
            windows=windows,
            prefix_cache=prefix_cache,
            resident=lambda pattern: pattern not in self.absent,
        )
        self.memory = fakes.Memory(self.scheduler)
        self.live: list[Sequence] = []
        self.now = 0.0
        self.sampled = 0

    @rule(
        copies=st.integers(1, 6),
        length=st.one_of(st.integers(1, 90), st.integers(1, 20)),
        shared=st.sampled_from([0, 20, 90, 90]),
        gates=st.sampled_from(PATTERNS),
        max_tokens=st.integers(1, 90),
        single_pass=st.sampled_from([False, False, False, True]),
        prompt_logprobs=st.sampled_from([None, None, 0]),
        priority=st.integers(-1, 1),
        client=st.sampled_from("xyz"),
        timeout=st.sampled_from([None, 3.0, 30.0]),
        follow=st.booleans(),
    )
    def add(self, copies, length, shared, gates, single_pass, timeout, follow, **request):
        prompt = tuple(range(min(length, shared))) + tuple(500 + i for i in range(length - shared))
        if not self.scheduler.fits(len(prompt) + request["max_tokens"]):
            return
        if single_pass and self.scheduler.fits_single_pass(len(prompt)):
            gates = None
        leader = None
        for _ in range(copies):
            deadline = None if timeout is None else self.now + timeout
            each = fakes.sequence(
                prompt, gates, single_pass=single_pass, deadline=deadline, leader=leader, **request
            )
            self.scheduler.add(each, self.now)
            self.memory.meet(each)
            self.live.append(each)
            leader = (leader or each.request.id) if follow else None

    @rule(prompt_tokens=st.integers(0, 50), token=st.integers(0, 2), late=st.sampled_from(PATTERNS))
    def one_step(self, prompt_tokens, token, late):
        self.step(prompt_tokens, token, late)

    def step(self, prompt_tokens, token, late):
        self.now += 1
        plan = self._plan(min(prompt_tokens, self.scheduler.prompt_budget().total))
        self.memory.run(plan, token, late)
        self._end()

    @rule(steps=st.integers(2, 40), late=st.sampled_from(PATTERNS))
    def steps(self, steps, late):
        for _ in range(steps):
            self.step(1000, 0, late)
            self.scheduler.check()

    @rule()
    def fail_a_step(self):
        plan = self._plan(self.scheduler.prompt_budget().total)
        self.memory.spoil(plan)
        for each in [*plan.decode, *(chunk.sequence for chunk in plan.prefill)]:
            self._leave(each, reusable=False)
        assert not self.memory.junk(), "what a failed step wrote is still there"

    @rule(data=st.data())
    def cancel(self, data):
        if self.live:
            self._leave(data.draw(st.sampled_from(self.live)), reusable=True)

    @rule(data=st.data())
    def fail_one(self, data):
        if self.live:
            self._leave(data.draw(st.sampled_from(self.live)), reusable=False)

    @rule(key=st.sampled_from([ExpertKey("a", 1), ExpertKey("b", 1)]))
    def forget(self, key):
        self.scheduler.forget(key)
        self.memory.replace(key)

    @rule(gates=st.sampled_from(PATTERNS[2:]))
    def evict_or_load(self, gates):
        self.absent ^= {gates}

    @rule()
    def expire(self):
        late = self.scheduler.expired(self.now)
        assert all(each.request.deadline <= self.now for each in late)
        for each in late:
            self._leave(each, reusable=True)

    @invariant()
    def books_agree(self):
        self.scheduler.check()
        assert {*self.scheduler.running, *self.scheduler.waiting} == set(self.live)
        kv = self.scheduler.kv
        assert kv.used_blocks + kv.cached_blocks + kv.free_blocks == kv.total_blocks
        assert 0 <= kv.hits <= kv.queries

    def teardown(self):
        if not hasattr(self, "live"):
            return
        self.absent.clear()
        for _ in range(20_000):
            if not self.live:
                break
            self.now += 1
            plan = self._plan(self.scheduler.prompt_budget().total)
            assert plan.decode or plan.prefill, "somebody is here and nothing is planned"
            self.memory.run(plan)
            self._end()
        assert not self.live, "the queue never empties"
        self.scheduler.check()
        self.scheduler.kv.check()
        assert not self.scheduler.shares.served

    def _plan(self, prompt_tokens):
        before = [each for each in self.scheduler.running if not each.in_prefill]
        plan = self.scheduler.plan(prompt_tokens, self.now)
        chunks = plan.prefill
        assert sum(chunk.count for chunk in chunks) <= prompt_tokens or (
            len(chunks) == 1
            and chunks[0].sequence.unrouted
            and chunks[0].count <= self.scheduler.budget.chunk_tokens
        )
        for chunk in chunks:
            assert chunk.count > 0
            assert chunk.count == chunk.sequence.pending or not chunk.sequence.unrouted
        planned = [*plan.decode, *(chunk.sequence for chunk in chunks)]
        assert len(set(planned)) == len(planned)
        assert set(planned) <= set(self.scheduler.running)
        assert not set(plan.preempted) & set(planned)
        assert set(plan.decode) == set(before) - set(plan.preempted), "prefill starves decode"
        patterns = [each.root for each in plan.decode]
        assert len(set(patterns)) == sum(a != b for a, b in zip(patterns, [None, *patterns], strict=False))
        for victim in plan.preempted:
            assert all(victim.rank > each.rank for each in plan.decode)
        return plan

    def _end(self):
        for each in [each for each in self.live if each.generated >= each.request.sampling.max_tokens]:
            self._leave(each, reusable=True)

    def _leave(self, each, *, reusable):
        freed = self.scheduler.remove(each, reusable=reusable)
        assert not (reusable and freed)
        for number, block in freed:
            assert all(block not in other.tables[number] for other in self.scheduler.running)
        self.memory.wipe(freed)
        self.live.remove(each)
        assert self.scheduler.remove(each) == []


Serving.TestCase.settings = settings(
    max_examples=40,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
test_serving = Serving.TestCase
