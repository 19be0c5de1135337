"""Who joins a step: first come first served, decode first, prompts by budget; rows are never lost."""

from hypothesis import given
from hypothesis import strategies as st

from service.core import GenerationRequest, Pattern, SamplingParams
from service.scheduler.rows import RowPool
from service.scheduler.scheduler import Budget, PromptBudget, Scheduler
from service.scheduler.sequence import Sequence


def _sequence(name: str, prompt: int) -> Sequence:
    request = GenerationRequest(name, tuple(range(prompt)), SamplingParams(max_tokens=4))
    return Sequence(request, pattern=Pattern())


def _advance(plan, sequences_done=()) -> None:
    for sequence in plan.decode:
        sequence.computed += 1
        sequence.tokens.append(0)
    for chunk in plan.prefill:
        chunk.sequence.computed += chunk.count
        if not chunk.sequence.in_prefill:
            chunk.sequence.tokens.append(0)


def test_requests_are_admitted_in_order_while_rows_last():
    scheduler = Scheduler(2, Budget())
    sequences = [_sequence(f"r{i}", 3) for i in range(3)]
    for sequence in sequences:
        scheduler.add(sequence)
    plan = scheduler.plan(scheduler.prompt_budget().total)
    assert [chunk.sequence for chunk in plan.prefill] == sequences[:2]
    assert [s.row for s in sequences] == [0, 1, None]
    scheduler.remove(sequences[0])
    scheduler.plan(scheduler.prompt_budget().total)
    assert sequences[2].row == 0


def test_a_long_prompt_is_cut_into_chunks_beside_decoding_rows():
    scheduler = Scheduler(4, Budget(step_tokens=100, chunk_tokens=10))
    short, long = _sequence("short", 3), _sequence("long", 35)
    scheduler.add(short)
    _advance(scheduler.plan(scheduler.prompt_budget().total))
    scheduler.add(long)
    seen = []
    while long.in_prefill:
        plan = scheduler.plan(scheduler.prompt_budget().total)
        assert plan.decode == [short]
        seen.append([chunk.count for chunk in plan.prefill])
        _advance(plan)
    assert seen == [[10], [10], [10], [5]]


def test_prompts_use_the_whole_step_when_nobody_decodes():
    scheduler = Scheduler(4, Budget(step_tokens=50, chunk_tokens=5))
    for i in range(3):
        scheduler.add(_sequence(f"r{i}", 20))
    assert [chunk.count for chunk in scheduler.plan(scheduler.prompt_budget().total).prefill] == [20, 20, 10]


def test_routing_may_take_half_of_the_prompt_tokens_while_prompts_wait():
    scheduler = Scheduler(4, Budget(step_tokens=50, chunk_tokens=10))
    assert scheduler.prompt_budget() == PromptBudget(50, 50)
    first = _sequence("r", 40)
    scheduler.add(first)
    assert scheduler.prompt_budget() == PromptBudget(50, 25)
    _advance(scheduler.plan(50))
    assert scheduler.prompt_budget() == PromptBudget(10, 10)
    scheduler.add(_sequence("s", 40))
    assert scheduler.prompt_budget() == PromptBudget(10, 5)


def test_a_far_row_is_pulled_down_once_most_rows_are_empty():
    scheduler = Scheduler(8, Budget())
    sequences = [_sequence(f"r{i}", 2) for i in range(8)]
    for sequence in sequences:
        scheduler.add(sequence)
    _advance(scheduler.plan(scheduler.prompt_budget().total))
    for sequence in sequences[:7]:
        scheduler.remove(sequence)
    plan = scheduler.plan(scheduler.prompt_budget().total)
    assert [(move.sequence, move.source, move.target) for move in plan.moves] == [(sequences[7], 7, 0)]
    assert plan.decode == [sequences[7]]
    assert scheduler.rows.free == 7


def test_removing_twice_or_while_waiting_is_harmless():
    scheduler = Scheduler(1, Budget())
    running, waiting = _sequence("a", 2), _sequence("b", 2)
    scheduler.add(running)
    scheduler.add(waiting)
    scheduler.plan(scheduler.prompt_budget().total)
    scheduler.remove(waiting)
    scheduler.remove(waiting)
    scheduler.remove(running)
    scheduler.remove(running)
    assert scheduler.rows.free == 1
    assert not scheduler.waiting
    assert not scheduler.running


@given(
    rows=st.integers(1, 6),
    chunk=st.integers(1, 20),
    work=st.lists(
        st.tuples(st.integers(1, 40), st.integers(1, 5), st.integers(0, 3)), min_size=1, max_size=15
    ),
)
def test_every_request_ends_and_rows_stay_exclusive(rows, chunk, work):
    scheduler = Scheduler(rows, Budget(step_tokens=32, chunk_tokens=chunk))
    wanted = {}
    pending = list(enumerate(work))
    for _ in range(10_000):
        if pending:
            index, (prompt, tokens, _) = pending.pop(0)
            sequence = _sequence(f"r{index}", prompt)
            wanted[sequence] = tokens
            scheduler.add(sequence)
        plan = scheduler.plan(scheduler.prompt_budget().total)
        live = [s.row for s in scheduler.running]
        assert len(set(live)) == len(live)
        assert scheduler.rows.free + len(live) == rows
        assert [s.row for s in plan.decode] == sorted(s.row for s in plan.decode)
        _advance(plan)
        for sequence in [s for s in scheduler.running if s.generated >= wanted[s]]:
            scheduler.remove(sequence)
        if not pending and not scheduler.running and not scheduler.waiting:
            return
    raise AssertionError("the queue never emptied")


def test_the_row_pool_hands_out_the_lowest_free_row():
    pool = RowPool(3)
    assert [pool.take(), pool.take(), pool.take(), pool.take()] == [0, 1, 2, None]
    pool.give(2)
    pool.give(0)
    assert pool.take() == 0
    assert pool.free == 1
