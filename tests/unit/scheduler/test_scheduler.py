"""Steps: decode always, prompts by budget, newcomers by blocks; who gives way, and who waits for whom."""

import time

import pytest

from service.core import ExpertKey
from service.scheduler.plan import PromptBudget
from service.scheduler.policy import Budget, Policy
from tests.unit.scheduler.fakes import pattern, scheduler, sequence, step


def _admitted(plan):
    return [chunk.sequence for chunk in plan.prefill]


def _counts(plan):
    return [chunk.count for chunk in plan.prefill]


def _enter(line, *sequences, now=0.0):
    for each in sequences:
        line.add(each, now)
    return sequences


# -- budget -----------------------------------------------------------------------------------------


def test_sequences_are_admitted_in_order_while_seats_last():
    line = scheduler(max_running=2)
    first, second, third = _enter(line, *(sequence(3) for _ in range(3)))
    assert _admitted(step(line)) == [first, second]
    assert step(line).prefill == []
    line.remove(first)
    plan = step(line)
    assert (plan.decode, _admitted(plan)) == ([second], [third])


def test_a_long_prompt_is_cut_into_chunks_beside_decoding_sequences():
    line = scheduler(budget=Budget(step_tokens=100, chunk_tokens=10))
    (short,) = _enter(line, sequence(3))
    step(line)
    (long,) = _enter(line, sequence(35))
    seen = []
    while long.in_prefill:
        plan = step(line)
        assert plan.decode == [short]
        seen.append(_counts(plan))
    assert seen == [[10], [10], [10], [5]]


def test_prompts_use_the_whole_step_when_nobody_decodes():
    line = scheduler(budget=Budget(step_tokens=50, chunk_tokens=5))
    _enter(line, *(sequence(20) for _ in range(3)))
    assert _counts(step(line)) == [20, 20, 10]


def test_a_prompt_that_runs_goes_on_before_newcomers_start():
    line = scheduler(budget=Budget(step_tokens=20, chunk_tokens=20))
    (first,) = _enter(line, sequence(30))
    step(line)
    (second,) = _enter(line, sequence(30))
    plan = step(line)
    assert [(chunk.sequence, chunk.count) for chunk in plan.prefill] == [(first, 10), (second, 10)]


def test_routing_may_take_half_of_the_prompt_tokens_while_prompts_wait():
    line = scheduler(budget=Budget(step_tokens=50, chunk_tokens=10))
    assert line.prompt_budget() == PromptBudget(50, 50)
    _enter(line, sequence(40))
    assert line.prompt_budget() == PromptBudget(50, 25)
    step(line)
    assert line.prompt_budget() == PromptBudget(10, 10)
    _enter(line, sequence(40))
    assert line.prompt_budget() == PromptBudget(10, 5)


def test_equal_patterns_decode_side_by_side():
    line = scheduler()
    a1, b1, a2, shared, b2 = _enter(line, *(sequence(2, pattern(*name)) for name in ("a", "b", "a", "", "b")))
    step(line)
    assert step(line).decode == [a1, a2, b1, b2, shared]


def test_single_pass_sequences_decode_apart_from_ordinary_ones_of_their_pattern():
    line = scheduler()
    gates = pattern("a")
    one, two, three = _enter(
        line, sequence(2, gates, single_pass=True), sequence(2, gates), sequence(2, gates)
    )
    line.add(late := sequence(2, None, single_pass=True), 0.0)
    plan = line.plan(100, 0.0)
    late.pattern = gates
    for chunk in plan.prefill:
        line.advanced(chunk.sequence, chunk.count)
        chunk.sequence.tokens.append(1)
    assert step(line).decode == [one, late, two, three]


# -- blocks -----------------------------------------------------------------------------------------


def test_what_can_never_fit_is_refused_at_once():
    line = scheduler(blocks=4)
    assert line.fits(64)
    assert not line.fits(65)
    with pytest.raises(ValueError, match="request r can never have enough KV blocks"):
        line.add(sequence(40, max_tokens=25, name="r"), 0.0)
    assert not line.waiting


def test_admission_keeps_a_block_for_everybody_who_runs():
    line = scheduler(blocks=6)
    first, second = _enter(line, sequence(30, max_tokens=10), sequence(60, max_tokens=10))
    assert _admitted(step(line)) == [first], "4 blocks are free, 4 needed, 1 to keep"
    line.remove(first)
    assert _admitted(step(line)) == [second]


def test_who_does_not_fit_is_not_overtaken_by_a_smaller_one():
    line = scheduler(blocks=8)
    _enter(line, sequence(60, max_tokens=10))
    step(line)
    large, small = _enter(line, sequence(60, max_tokens=10), sequence(2, max_tokens=2))
    assert step(line).prefill == []
    assert list(line.waiting) == [large, small]


def _crowded(*priorities, blocks, max_tokens=60):
    """Sequences of one block each that fill it exactly when all have decoded once."""
    line = scheduler(blocks=blocks)
    crowd = _enter(line, *(sequence(14, max_tokens=max_tokens, priority=p) for p in priorities))
    while line.waiting:
        step(line)
    return line, crowd


def test_under_pressure_the_latest_of_the_lowest_priority_gives_its_blocks_up():
    line, (low1, low2, high) = _crowded(1, 1, 0, blocks=5)
    preempted = []
    while not preempted:
        plan = step(line)
        line.check()
        preempted = plan.preempted
    assert preempted == [low2]
    assert set(plan.decode) == {high, low1}
    assert (low2.computed, low2.tables, low2.preemptions) == (0, [], 1)
    assert low2 in line.waiting


def test_a_preempted_sequence_computes_prompt_and_answer_again_and_goes_on():
    line, (first, second) = _crowded(0, 0, blocks=5)
    while second not in line.waiting:
        step(line)
    generated = second.generated
    assert generated > 1
    line.remove(first)
    plan = step(line)
    assert _admitted(plan) == [second]
    assert plan.prefill[0].count + second.cached >= second.prompt_length
    assert second.generated == generated + 1
    assert step(line).decode == [second]
    line.check()


def test_a_preempted_sequence_finds_what_it_had_computed_if_nobody_took_the_blocks():
    line = scheduler(blocks=20)
    (each,) = _enter(line, sequence(40))
    step(line)
    plan = line.plan(0, 0.0)
    line._preempt(each, plan, 0.0)
    assert _counts(step(line)) == [9]
    assert each.cached == 32
    assert line.kv.queries == 40, "counted once"


def test_nobody_joins_in_a_step_that_preempts():
    line, (first, second) = _crowded(0, 0, blocks=5)
    while True:
        (tiny,) = _enter(line, sequence(1, max_tokens=1, priority=-1))
        plan = step(line)
        if plan.preempted:
            break
        line.remove(tiny)
    assert plan.preempted == [second]
    assert (plan.decode, plan.prefill) == ([first], [])


def test_a_decoding_sequence_takes_blocks_from_a_prompt_behind_it():
    line = scheduler(blocks=8, budget=Budget(step_tokens=16, chunk_tokens=2))
    (first,) = _enter(line, sequence(16, max_tokens=80))
    step(line)
    (long,) = _enter(line, sequence(70, max_tokens=10))
    preempted = []
    for _ in range(60):
        preempted += step(line).preempted
        line.check()
    assert preempted[:1] == [long]
    assert first.generated > 40


def test_a_prompt_takes_window_blocks_from_a_prompt_behind_it():
    line = scheduler(blocks=12, windows=(40,), budget=Budget(step_tokens=143, chunk_tokens=143))
    first, second = _enter(line, sequence(300), sequence(25))
    assert _counts(step(line)) == [138, 5], "more in one step would not fit even an empty pool"
    plan = step(line)
    assert (_admitted(plan), plan.preempted) == ([first], [second])
    line.check()
    while second.in_prefill:
        step(line)
        line.check()


def test_a_prompt_never_takes_window_blocks_from_decoding_sequences_but_waits():
    line = scheduler(blocks=7, windows=(40,), budget=Budget(step_tokens=64, chunk_tokens=4))
    (decoding,) = _enter(line, sequence(14, max_tokens=2000))
    step(line)
    (prompt,) = _enter(line, sequence(1000, max_tokens=10))
    waited = 0
    while prompt.in_prefill and decoding.generated < 1000:
        plan = step(line)
        line.check()
        assert plan.decode == [decoding]
        waited += bool(prompt.tables and not plan.prefill)
    assert waited
    line.remove(decoding)
    while prompt.in_prefill:
        step(line)


def test_removing_twice_or_while_waiting_is_harmless():
    line = scheduler(max_running=1)
    running, waiting = _enter(line, sequence(2), sequence(2))
    step(line)
    for each in (waiting, waiting, running, running):
        assert line.remove(each) == []
        line.check()
    line.kv.check()
    assert not line.running
    assert not line.waiting


def test_a_failed_sequence_returns_its_blocks_for_wiping():
    line = scheduler(windows=(None, 20))
    (each,) = _enter(line, sequence(20))
    line.plan(100, 0.0)
    tables = [list(table) for table in each.tables]
    freed = line.remove(each, reusable=False)
    assert sorted(freed) == sorted((group, block) for group, table in enumerate(tables) for block in table)
    line.check()


# -- single pass ------------------------------------------------------------------------------------


def test_a_single_pass_prompt_is_never_cut():
    line = scheduler(budget=Budget(step_tokens=60, chunk_tokens=30))
    first, whole = _enter(line, sequence(40), sequence(30, None, single_pass=True))
    assert _admitted(step(line)) == [first], "20 of 60 tokens are left"
    plan = line.plan(line.prompt_budget().total, 0.0)
    assert plan.decode == [first]
    assert [(chunk.sequence, chunk.count) for chunk in plan.prefill] == [(whole, 30)]


def test_a_single_pass_prompt_that_is_alone_may_take_what_routing_was_left():
    line = scheduler(budget=Budget(step_tokens=60, chunk_tokens=30))
    _enter(line, sequence(30, None, single_pass=True))
    assert _counts(line.plan(10, 0.0)) == [30]


def test_a_single_pass_prompt_whose_step_came_to_nothing_is_planned_whole_again():
    line = scheduler(budget=Budget(step_tokens=30, chunk_tokens=30))
    one, two = _enter(line, *(sequence(length, None, single_pass=True) for length in (20, 10)))
    _enter(line, sequence(3))
    assert _admitted(line.plan(30, 0.0)) == [one, two]
    assert _admitted(line.plan(25, 0.0)) == [one], "5 are too few for the other, and nobody overtakes it"
    assert _admitted(line.plan(30, 0.0)) == [one, two]


def test_a_single_pass_prompt_too_long_for_one_step_is_refused():
    line = scheduler(budget=Budget(step_tokens=60, chunk_tokens=30))
    assert line.fits_single_pass(30)
    assert not line.fits_single_pass(31)
    with pytest.raises(ValueError, match="no single step"):
        line.add(sequence(31, None, single_pass=True), 0.0)
    with pytest.raises(ValueError, match="no pattern"):
        line.add(sequence(3, None), 0.0)
    line.add(sequence(31, pattern("a"), single_pass=True), 0.0)


# -- parallel sampling ------------------------------------------------------------------------------


def test_followers_wait_for_their_leaders_prompt_and_find_it():
    line = scheduler(budget=Budget(step_tokens=20, chunk_tokens=20))
    ids = tuple(range(50))
    leader = sequence(ids, name="lead")
    followers = [sequence(ids, leader="lead") for _ in range(3)]
    _enter(line, leader, *followers)
    other = _enter(line, sequence(100))[0]
    for counts in ([20], [20], [10, 10]):
        plan = step(line)
        assert _counts(plan) == counts
        assert not set(_admitted(plan)) & set(followers)
    plan = step(line)
    assert plan.prefill[0].sequence is other
    while any(each in line.waiting for each in followers):
        step(line)
    assert [each.cached for each in followers] == [48] * 3


def test_when_a_leader_goes_its_first_follower_leads():
    line = scheduler(budget=Budget(step_tokens=20, chunk_tokens=20))
    ids = tuple(range(50))
    leader = sequence(ids, name="lead")
    heir, *rest = [sequence(ids, leader="lead") for _ in range(3)]
    _enter(line, leader, heir, *rest)
    step(line)
    line.remove(leader, reusable=False)
    line.check()
    assert _admitted(step(line)) == [heir]
    line.remove(rest[0])
    while heir.in_prefill:
        step(line)
    step(line)
    assert rest[1].cached == 48


@pytest.mark.parametrize("why", ["no prefix cache", "wants prompt logprobs", "leader unknown"])
def test_followers_that_gain_nothing_do_not_wait(why):
    line = scheduler(prefix_cache=why != "no prefix cache")
    ids = tuple(range(50))
    follower = sequence(
        ids,
        leader="x" if why == "leader unknown" else "lead",
        prompt_logprobs=0 if why == "wants prompt logprobs" else None,
    )
    _enter(line, sequence(ids, name="lead"), follower)
    assert follower in _admitted(step(line))


# -- fairness and experts ---------------------------------------------------------------------------


def test_clients_share_a_busy_server_whatever_each_of_them_sends():
    line = scheduler(max_running=4)
    _enter(line, *(sequence(8, client="greedy", max_tokens=4) for _ in range(200)))
    _enter(line, *(sequence(8, client="modest", max_tokens=4) for _ in range(40)))
    served = {"greedy": 0, "modest": 0}
    for _ in range(60):
        step(line)
        for each in [each for each in line.running if each.generated >= 4]:
            served[each.request.client] += 1
            line.remove(each)
    assert abs(served["greedy"] - served["modest"]) <= 4
    assert served["modest"] > 20


def test_cached_prompt_tokens_cost_nothing():
    line = scheduler()
    ids = tuple(range(50))
    (first,) = _enter(line, sequence(ids, client="x"))
    step(line)
    assert line.shares.served["x"] == 50 + 2
    _enter(line, sequence(ids, client="x"))
    step(line)
    assert line.shares.served["x"] == 52 + 2 + 2 + 2
    assert first.generated == 2


def test_recomputing_costs_its_client_nothing_and_only_sampled_tokens_count_as_generated():
    line = scheduler(budget=Budget(step_tokens=16, chunk_tokens=16))
    (each,) = _enter(line, sequence(40, client="x"))
    for _ in range(3):
        step(line)
    assert line.shares.served["x"] == 40 + 2
    line._preempt(each, line.plan(0, 0.0), 0.0)
    step(line)
    assert line.shares.served["x"] == 40 + 2 + 2


def test_those_who_join_in_one_step_count_as_active_at_once():
    line = scheduler(max_running=3, policy=Policy(max_active_experts=2))
    first, _, alike = _enter(line, *(sequence(4, pattern(*names)) for names in ("ab", "cd", "ab")))
    assert _admitted(step(line))[:2] == [first, alike]


def test_low_priority_is_served_within_the_bound_under_a_stream_of_high_priority():
    line = scheduler(max_running=2, policy=Policy(max_wait_seconds=20.0))
    (low,) = _enter(line, sequence(4, priority=9, client="low"))
    for now in range(40):
        while len(line.waiting) < 5:
            line.add(sequence(4, priority=0, max_tokens=2), float(now))
        step(line, float(now))
        for each in [each for each in line.running if each is not low and each.generated >= 2]:
            line.remove(each)
        if low.tables:
            break
    assert 20 < now <= 23


def test_absent_experts_do_not_hold_others_up():
    absent = {pattern("cold")}
    line = scheduler(resident=lambda wanted: wanted not in absent)
    cold, warm = _enter(line, sequence(4, pattern("cold")), sequence(4, pattern("a")))
    assert list(line.waiting_patterns()) == [pattern("cold"), pattern("a")]
    assert _admitted(step(line)) == [warm]
    absent.clear()
    assert _admitted(step(line)) == [cold]


def test_forgotten_generations_are_not_found_and_not_published_by_who_still_runs():
    line = scheduler(budget=Budget(step_tokens=32))
    ids = tuple(range(100))
    (running,) = _enter(line, sequence(ids, pattern("a")))
    step(line)
    line.forget(ExpertKey("a", 1))
    while running.in_prefill:
        step(line)
    line.remove(running)
    assert line.kv.cached_blocks == 0
    line.kv.check()


def test_who_came_before_a_generation_was_forgotten_finds_nothing_of_who_came_after():
    line = scheduler(max_running=1)
    ids = tuple(range(50))
    other, before = _enter(line, sequence(4), sequence(ids, pattern("a")))
    step(line)
    line.forget(ExpertKey("a", 1))
    (after,) = _enter(line, sequence(ids, pattern("a"), priority=-1))
    line.remove(other)
    assert _admitted(step(line)) == [after]
    line.remove(after)
    step(line)
    assert (before.generated, before.cached) == (1, 0)


# -- deadlines --------------------------------------------------------------------------------------


def test_deadlines_pass_while_waiting_and_while_running():
    line = scheduler(max_running=1)
    running, waiting, patient = _enter(line, sequence(deadline=5.0), sequence(deadline=4.0), sequence())
    step(line)
    assert line.expired(3.9) == []
    assert line.expired(5.0) == [waiting, running]
    for each in (waiting, running):
        line.remove(each)
    line.check()
    assert _admitted(step(line)) == [patient]


def test_an_ended_sequence_does_not_expire():
    line = scheduler()
    (ended,) = _enter(line, sequence(deadline=5.0))
    line.remove(ended)
    line.check()
    assert line.expired(9.0) == []


# -- cost -------------------------------------------------------------------------------------------


def test_ten_thousand_waiting_sequences_do_not_slow_a_step_down():
    asked = 0

    def resident(_):
        nonlocal asked
        asked += 1
        return True

    line = scheduler(10_000, max_running=32, policy=Policy(max_active_experts=8), resident=resident)
    names = [f"e{number}" for number in range(500)]
    for number in range(10_000):
        each = sequence(8, pattern(names[number % 500]), client=f"c{number % 100}", max_tokens=2)
        line.add(each, 0.0)
    fastest = float("inf")
    for now in range(20):
        began = time.perf_counter()
        plan = line.plan(line.prompt_budget().total, float(now))
        fastest = min(fastest, time.perf_counter() - began)
        assert len(plan.prefill) == 32
        for each in _admitted(plan):
            line.remove(each)
    assert asked <= 20 * 32 * 64
    assert fastest < 0.02, "it takes about 1 ms"
