"""Who takes part in the next step: decoding sequences always, prompts by token budget, newcomers by blocks."""

from bisect import insort
from collections import Counter, deque
from collections.abc import Callable, Iterator
from itertools import chain, count
from operator import attrgetter

from service.core import ExpertKey, Pattern
from service.scheduler.blocks import KvBlocks
from service.scheduler.deadlines import Deadlines
from service.scheduler.experts import ActiveExperts
from service.scheduler.fairness import FairShare
from service.scheduler.plan import PrefillChunk, PromptBudget, StepPlan
from service.scheduler.policy import Budget, Limits, Policy
from service.scheduler.prefix import root_of
from service.scheduler.sequence import Sequence
from service.scheduler.waiting import WaitingLine

_rank = attrgetter("rank")


class Scheduler:
    """The waiting line, the running sequences, and their blocks.

    Invariant: a sequence has blocks exactly while it runs, and enough of them for every planned token.

    Args:
        resident: whether a pattern's experts are in their slots.

    Attributes:
        running: by priority, then arrival. Blocks are given in that order and taken away from the end.
    """

    def __init__(
        self,
        limits: Limits,
        kv: KvBlocks,
        budget: Budget,
        policy: Policy,
        resident: Callable[[Pattern], bool] = lambda _: True,
    ) -> None:
        self.limits = limits
        self.kv = kv
        self.budget = budget
        self.policy = policy
        self.shares = FairShare(policy)
        self.waiting = WaitingLine(policy.max_wait_seconds, self.shares)
        self.running: list[Sequence] = []
        self._resident = resident
        self._arrivals = count()
        self._deadlines = Deadlines()
        self._followers: dict[str, list[Sequence]] = {}

    # -- come and go --------------------------------------------------------------------------------

    def fits(self, tokens: int) -> bool:
        """Whether a sequence of that many tokens, prompt and answer, can ever run."""
        return self.kv.fits(tokens)

    def fits_single_pass(self, tokens: int) -> bool:
        """Whether a prompt of that many tokens may be routed in its own prefill, which must be one step."""
        return tokens <= min(self.budget.step_tokens, self.budget.chunk_tokens) and self.kv.fits(
            tokens + 1, tokens
        )

    def add(self, sequence: Sequence, now: float) -> None:
        """Queue a sequence whose pattern is known, or that is single-pass.

        Args:
            now: monotonic seconds, never less than at the last call; its waiting counts from here.

        Raises:
            ValueError: it can never run; `fits` and `fits_single_pass` say so beforehand.
        """
        request = sequence.request
        if not self.fits(sequence.prompt_length + request.sampling.max_tokens):
            raise ValueError(f"request {request.id} can never have enough KV blocks")
        if sequence.pattern is None and not (
            sequence.single_pass and self.fits_single_pass(sequence.prompt_length)
        ):
            raise ValueError(f"request {request.id} has no pattern and no single step to find it in")
        root_of(sequence)
        sequence.rank = (request.priority, next(self._arrivals))
        self.shares.enter(sequence)
        self._deadlines.watch(sequence)
        self._followers[request.id] = []
        party = self._followers.get(request.leader or "") if self._follows(sequence) else None
        if party is not None:
            party.append(sequence)
        self.waiting.push(sequence, now, parked=party is not None)

    def remove(self, sequence: Sequence, *, reusable: bool = True) -> list[tuple[int, int]]:
        """Take a sequence out, wherever it is. Harmless if it is not here.

        Args:
            reusable: what it computed is good. If not, none of it stays in the prefix cache.

        Returns:
            Unless reusable: (KV group, block) of what nobody else holds, to be wiped.
        """
        if sequence in self.waiting:
            self.waiting.drop(sequence)
        elif sequence.tables:
            self.running.remove(sequence)
        else:
            return []
        freed = self.kv.free(sequence, reusable=reusable)
        self.shares.leave(sequence)
        self._deadlines.drop(sequence)
        self._lead_on(sequence, proven=False)
        return [] if reusable else freed

    def expired(self, now: float) -> list[Sequence]:
        """Sequences here whose deadline has come, each told once; they stay until removed."""
        return self._deadlines.passed(now)

    def forget(self, key: ExpertKey) -> None:
        """A generation is gone: nothing computed with it is found again."""
        self.kv.forget(key)
        for sequence in chain(self.running, self.waiting):
            if sequence.pattern is not None and key in sequence.pattern.experts:
                sequence.shareable = False

    def waiting_patterns(self) -> Iterator[Pattern]:
        """Each waiting pattern once, roughly in the order of admission; lazy. Not to be held across changes."""
        return self.waiting.patterns()

    # -- a step -------------------------------------------------------------------------------------

    def prompt_budget(self) -> PromptBudget:
        """How many prompt tokens the coming step may carry, and how many of them for the router."""
        prefilling = sum(sequence.in_prefill for sequence in self.running)
        decoding = prefilling < len(self.running)
        total = self.budget.chunk_tokens if decoding else self.budget.step_tokens
        return PromptBudget(total, max(1, total // 2) if prefilling or self.waiting else total)

    def plan(self, prompt_tokens: int, now: float) -> StepPlan:
        """Lay out the next step; every token in it has its block.

        Args:
            prompt_tokens: most tokens to prefill. A single-pass prompt that is the only one may take the
                whole `chunk_tokens` nevertheless, since it cannot be cut.
            now: monotonic seconds.
        """
        plan = StepPlan()
        self._decode(plan, now)
        left = self._prefill(plan, prompt_tokens, now)
        if left > 0 and not plan.preempted and self.waiting and len(self.running) < self.limits.max_running:
            self._admit(plan, left, now)
        return plan

    def advanced(self, sequence: Sequence, count: int) -> None:
        """The step computed `count` tokens of a running sequence, and they are good.

        A single-pass sequence's pattern must have been set by then. Call it before the sampled token is
        appended.
        """
        prompt = sequence.prompt_length
        proves = sequence.computed < prompt <= sequence.computed + count
        if not sequence.root:
            root_of(sequence)
        self.kv.advance(sequence, count)
        if sequence.computed == len(sequence.tokens) and sequence.request.pooling is None:
            self.shares.charge(sequence, generated=1)
        if proves:
            self._lead_on(sequence, proven=True)

    def _decode(self, plan: StepPlan, now: float) -> None:
        running, grow = self.running, self.kv.grow
        alike: dict[bytes, list[Sequence]] = {}
        position = 0
        while position < len(running):
            sequence = running[position]
            if not sequence.in_prefill:
                if not grow(sequence, sequence.computed + 1):
                    # The last one is this one or behind it, so it is in no plan yet.
                    self._preempt(running[-1], plan, now)
                    continue
                alike.setdefault(sequence.root, []).append(sequence)
            position += 1
        for sequences in alike.values():
            plan.decode.extend(sequences)

    def _prefill(self, plan: StepPlan, left: int, now: float) -> int:
        """Go on with the prompts that run; returns how many tokens newcomers may take."""
        prompts = deque(sequence for sequence in self.running if sequence.in_prefill)
        while prompts and left > 0:
            sequence = prompts.popleft()
            count = self._chunk(sequence, sequence.computed, left, plan)
            if not count:
                return 0
            while not self.kv.grow(sequence, sequence.computed + count):
                if not prompts:
                    # Decoding sequences hold what it lacks, and give it back as they go.
                    return 0
                self._preempt(prompts.pop(), plan, now)
            plan.prefill.append(PrefillChunk(sequence, count))
            left -= count
        return left

    def _admit(self, plan: StepPlan, left: int, now: float) -> None:
        experts = ActiveExperts(self.running, self.policy.max_active_experts, self._resident)
        while left > 0 and len(self.running) < self.limits.max_running:
            sequence = self.waiting.first(now, experts)
            if sequence is None:
                return
            hit = self.kv.match(sequence)
            count = self._chunk(sequence, hit, left, plan)
            # A block for everybody who runs: sixteen steps in which nobody need be preempted.
            if not count or not self.kv.admit(sequence, hit, count, reserve=len(self.running)):
                return
            self.waiting.drop(sequence)
            insort(self.running, sequence, key=_rank)
            experts.join(sequence)
            if not sequence.preemptions:
                self.shares.charge(sequence, prompt=sequence.prompt_length - sequence.cached)
            plan.prefill.append(PrefillChunk(sequence, count))
            left -= count

    def _chunk(self, sequence: Sequence, computed: int, left: int, plan: StepPlan) -> int:
        """How many tokens it computes in this step; 0 if it needs more than there are."""
        length = len(sequence.tokens)
        if not sequence.unrouted:
            return min(length - computed, left, self.kv.longest_step(length + 1))
        if not plan.prefill:
            left = max(left, min(self.budget.step_tokens, self.budget.chunk_tokens))
        return length if length <= left else 0

    def _preempt(self, victim: Sequence, plan: StepPlan, now: float) -> None:
        self.running.remove(victim)
        self.kv.free(victim)
        victim.preemptions += 1
        self.waiting.push(victim, now)
        plan.preempted.append(victim)

    # -- parallel sampling --------------------------------------------------------------------------

    def _follows(self, sequence: Sequence) -> bool:
        """Waiting for its leader's prompt would spare it work."""
        return self.kv.prefix_cache and not sequence.request.reads_prompt

    def _lead_on(self, leader: Sequence, *, proven: bool) -> None:
        """A prompt is in the cache, or its sequence is gone and the first follower leads the others."""
        party = [each for each in self._followers.pop(leader.request.id, []) if each in self.waiting]
        if party and not proven:
            self._followers[party[0].request.id].extend(party[1:])
            del party[1:]
        for follower in party:
            self.waiting.release(follower)

    # -- proof --------------------------------------------------------------------------------------

    def check(self) -> None:
        """Every invariant at once; slow, for tests.

        Raises:
            AssertionError: with what is wrong.
        """
        self.kv.check(self.running)
        self.waiting.check()
        here = [*self.running, *self.waiting]
        self.shares.check(Counter(self.shares.client(sequence) for sequence in here))
        assert self.running == sorted(self.running, key=_rank)
        assert len(self.running) <= self.limits.max_running
        assert len(set(here)) == len(here), "somebody runs and waits"
        assert all(len(sequence.tables) == len(self.kv.groups) for sequence in self.running)
        assert not any(sequence.tables or sequence.computed for sequence in self.waiting)
        assert len(self._deadlines) <= sum(sequence.request.deadline is not None for sequence in here)
        assert self._followers.keys() <= {sequence.request.id for sequence in here}
