"""KV blocks: shared where content is equal, given back when the window has passed, never lost."""

import pytest

from service.core import ExpertKey, Pattern
from service.scheduler.blocks import BLOCK_TOKENS, NULL_BLOCK, KvBlocks, KvGroup
from service.scheduler.pool import BlockPool
from tests.unit.scheduler.fakes import pattern, sequence


def _kv(*windows: int | None, blocks: int = 100, prefix_cache: bool = True) -> KvBlocks:
    return KvBlocks([KvGroup(window, blocks + 1) for window in windows or (None,)], prefix_cache=prefix_cache)


def _run(kv: KvBlocks, each, step: int = 1000):
    """Admit it and compute all of its tokens."""
    hit = kv.match(each)
    assert kv.admit(each, hit, min(step, len(each.tokens) - hit), 0)
    _compute(kv, each, step)
    return each


def _compute(kv: KvBlocks, each, step: int = 1000) -> None:
    while each.pending:
        count = min(step, each.pending)
        assert kv.grow(each, each.computed + count)
        kv.advance(each, count)


PROMPT = tuple(range(50))


def test_a_full_group_gets_blocks_for_the_whole_prompt_and_the_next_token_at_once():
    kv = _kv()
    each = sequence(48)
    assert kv.admit(each, 0, 5, 0)
    assert len(each.tables[0]) == 4
    assert NULL_BLOCK not in each.tables[0]
    assert (kv.used_blocks, kv.cached_blocks, kv.total_blocks) == (4, 0, 100)
    kv.check([each])


def test_admission_is_all_or_nothing_and_leaves_the_reserve():
    kv = _kv(None, 32, blocks=4)
    each = sequence(48)
    assert not kv.admit(each, 0, 48, 1)
    assert each.tables == []
    assert kv.used_blocks == 0
    assert kv.admit(each, 0, 48, 0)


def test_growing_takes_a_block_only_at_its_border_and_all_groups_or_none():
    kv = KvBlocks([KvGroup(None, 10), KvGroup(None, 3)])
    each = sequence(20)
    assert kv.admit(each, 0, 20, 0)
    assert kv.grow(each, 32)
    assert [len(table) for table in each.tables] == [2, 2]
    assert not kv.grow(each, 33)
    assert [len(table) for table in each.tables] == [2, 2]
    kv.check([each])


def test_an_equal_prompt_finds_whole_blocks_but_the_last_token_is_always_computed():
    kv = _kv()
    first = _run(kv, sequence(PROMPT[:48]))
    again = sequence(PROMPT[:48])
    assert kv.match(again) == 32
    longer = _run(kv, sequence(PROMPT))
    assert longer.cached == 48
    assert longer.tables[0][:3] == first.tables[0][:3]
    assert (kv.queries, kv.hits) == (98, 48)
    kv.check([first, longer])


def test_blocks_are_found_only_once_they_are_computed():
    kv = _kv()
    first, second = sequence(PROMPT), sequence(PROMPT)
    assert kv.admit(first, 0, 20, 0)
    assert kv.match(second) == 0
    kv.advance(first, 20)
    assert kv.match(second) == 16
    kv.advance(first, 30)
    assert kv.match(second) == 48


def test_generated_tokens_can_be_found_too():
    kv = _kv()
    first = _run(kv, sequence(PROMPT[:30]))
    first.tokens += [1, 2, 3]
    _compute(kv, first, 1)
    kv.free(first)
    follow_up = sequence((*PROMPT[:30], 1, 2, 3, 4))
    assert kv.match(follow_up) == 32
    assert kv.match(sequence((*PROMPT[:30], 1, 9, 3, 4))) == 16


@pytest.mark.parametrize(
    "other",
    [
        pattern("a"),
        pattern("a@2", weight=0.5),
        pattern("b", weight=0.5),
        pattern("a", "b", weight=0.5),
        pattern("a", weight=0.5 + 1e-12),
        Pattern(),
    ],
    ids=str,
)
def test_a_prompt_is_not_found_under_other_gates_or_another_generation(other):
    kv = _kv()
    _run(kv, sequence(PROMPT, pattern("a", weight=0.5)))
    assert kv.match(sequence(PROMPT, pattern("a", weight=0.5))) == 48
    assert kv.match(sequence(PROMPT, other)) == 0


def test_single_pass_and_ordinary_prompts_do_not_mix():
    kv = _kv()
    _run(kv, sequence(PROMPT, pattern("a"), single_pass=True))
    assert kv.match(sequence(PROMPT, pattern("a"))) == 0
    assert kv.match(sequence(PROMPT, pattern("a"), single_pass=True)) == 48


def test_a_single_pass_prompt_is_shared_only_if_its_pattern_is_known_when_it_is_computed():
    kv = _kv()
    late, in_time = sequence(PROMPT, None, single_pass=True), sequence(PROMPT, None, single_pass=True)
    assert kv.match(late) == 0
    assert kv.admit(late, 0, 50, 0)
    kv.advance(late, 50)
    late.pattern = pattern("a")
    late.tokens += range(20)
    _compute(kv, late, 1)
    assert kv.free(late), "nothing of it is kept"
    assert kv.cached_blocks == 0
    assert kv.admit(in_time, 0, 50, 0)
    in_time.pattern = pattern("a")
    kv.advance(in_time, 50)
    kv.free(in_time)
    assert kv.cached_blocks == 3


def test_who_wants_prompt_logprobs_computes_the_prompt():
    kv = _kv()
    _run(kv, sequence(PROMPT))
    asking = sequence(PROMPT, prompt_logprobs=1)
    assert kv.match(asking) == 0
    asking.tokens.append(1)
    assert kv.match(asking) == 48, "has them already, and was preempted"


def test_without_a_prefix_cache_nothing_is_kept():
    kv = _kv(prefix_cache=False)
    first = _run(kv, sequence(PROMPT))
    assert kv.match(sequence(PROMPT)) == 0
    kv.free(first)
    assert (kv.cached_blocks, kv.free_blocks, kv.queries) == (0, 100, 0)
    kv.check()


def test_a_shared_block_stays_until_its_last_owner_has_gone():
    kv = _kv()
    first = _run(kv, sequence(PROMPT))
    second = _run(kv, sequence(PROMPT))
    assert [group for group, _ in kv.free(first)] == [0], "only the last block, which is not whole"
    kv.check([second])
    kv.free(second)
    kv.check()
    assert kv.cached_blocks == 3


def test_the_end_of_the_least_recently_used_prefix_is_evicted_first():
    kv = _kv(blocks=8)
    old, new = _run(kv, sequence(PROMPT[:48])), _run(kv, sequence(tuple(range(100, 148))))
    kv.free(old)
    kv.free(new)
    assert (kv.cached_blocks, kv.free_blocks) == (6, 2)
    _run(kv, sequence(48))
    assert kv.match(sequence(PROMPT)) == 16
    assert kv.match(sequence(tuple(range(100, 150)))) == 48


def test_a_hit_is_recently_used():
    kv = _kv(blocks=8)
    for start in (0, 100):
        kv.free(_run(kv, sequence(tuple(range(start, start + 48)))))
    kv.free(_run(kv, sequence(PROMPT)))
    _run(kv, sequence(64))
    assert kv.match(sequence(PROMPT)) == 48


def test_admission_does_not_count_the_hits_as_room():
    kv = _kv(blocks=6)
    kv.free(_run(kv, sequence(PROMPT[:48])))
    wide = sequence((*PROMPT[:48], *range(500, 548)))
    assert kv.match(wide) == 48
    assert not kv.admit(wide, 48, 48, 0), "3 hits and 4 fresh ones do not fit 6"
    fitting = sequence((*PROMPT[:48], *range(500, 532)))
    assert kv.admit(fitting, kv.match(fitting), 32, 0)
    kv.check([fitting])


def test_what_cannot_be_trusted_is_never_found_and_is_returned_for_wiping():
    kv = _kv()
    bad = _run(kv, sequence(PROMPT))
    table = list(bad.tables[0])
    assert sorted(kv.free(bad, reusable=False)) == sorted((0, block) for block in table)
    assert kv.match(sequence(PROMPT)) == 0
    kv.check()
    assert kv.cached_blocks == 0


def test_untrusted_blocks_that_others_hold_are_not_wiped_but_not_found_again():
    kv = _kv()
    bad, bystander = _run(kv, sequence(PROMPT)), _run(kv, sequence(PROMPT))
    shared = set(bad.tables[0]) & set(bystander.tables[0])
    assert len(shared) == 3
    assert not shared & {block for _, block in kv.free(bad, reusable=False)}
    assert kv.match(sequence(PROMPT)) == 0
    kv.free(bystander)
    kv.check()
    assert kv.cached_blocks == 0


def test_forgetting_a_generation_drops_its_prefixes_and_no_others():
    kv = _kv()
    kept, both, gone = pattern("a@2"), pattern("a", "b"), pattern("a")
    for gates in (kept, both, gone):
        kv.free(_run(kv, sequence(PROMPT, gates)))
    running = _run(kv, sequence(PROMPT, gone))
    kv.forget(ExpertKey("a", 1))
    kv.check([running])
    assert [kv.match(sequence(PROMPT, gates)) for gates in (kept, both, gone)] == [48, 0, 0]
    kv.free(running)
    assert kv.cached_blocks == 3


def test_two_that_compute_the_same_prompt_at_once_keep_their_own_blocks():
    kv = _kv()
    first, second = sequence(PROMPT), sequence(PROMPT)
    for each in (first, second):
        assert kv.admit(each, 0, 50, 0)
    for each in (first, second):
        kv.advance(each, 50)
    assert not set(first.tables[0]) & set(second.tables[0])
    kv.check([first, second])
    assert len(kv.free(second)) == 4, "all private"
    kv.free(first)
    kv.check()


def test_blocks_behind_a_window_are_given_back():
    kv = _kv(None, 20)
    each = _run(kv, sequence(100), step=32)
    assert len(each.tables[0]) == 7
    assert NULL_BLOCK not in each.tables[0]
    # Token 100 sees 81 to 100.
    assert [block == NULL_BLOCK for block in each.tables[1]] == [True] * 5 + [False] * 2
    kv.check([each])
    each.tokens += range(12)
    _compute(kv, each, 1)
    # Token 112 sees 93 to 112.
    assert [block == NULL_BLOCK for block in each.tables[1]] == [True] * 5 + [False] * 2
    each.tokens += range(4)
    _compute(kv, each, 1)
    assert [block == NULL_BLOCK for block in each.tables[1]] == [True] * 6 + [False] * 2


@pytest.mark.parametrize("window", [1, 15, 16, 17, 18, 40])
@pytest.mark.parametrize("step", [1, 7, 16, 33])
def test_a_group_with_a_window_never_holds_more_than_its_peak(window, step):
    group = KvGroup(window, 100)
    kv = KvBlocks([group])
    each = sequence(200)
    assert kv.admit(each, 0, step, 0)
    held = 0
    while each.pending:
        count = min(step, each.pending)
        assert kv.grow(each, each.computed + count)
        held = max(held, kv.used_blocks)
        kv.advance(each, count)
    assert group.peak(200, step) - 1 <= held <= group.peak(200, step)


@pytest.mark.parametrize("size", [3, 4, 5])
@pytest.mark.parametrize("window", [2, 16, 17, 33])
def test_a_lone_sequence_fits_if_its_steps_are_short_enough(window, size):
    kv = KvBlocks([KvGroup(window, size + 1)])
    assert kv.fits(1000)
    step = kv.longest_step(1000)
    assert step >= 1
    assert kv.fits(1000, step)
    assert not kv.fits(1000, step + 1)
    _run(kv, sequence(1000), step)


def test_what_fits_depends_on_the_smallest_group():
    kv = KvBlocks([KvGroup(None, 11), KvGroup(64, 6)])
    assert kv.fits(160)
    assert not kv.fits(161)
    assert KvBlocks([KvGroup(64, 6)]).fits(10**9)
    assert not KvBlocks([KvGroup(64, 5)]).fits(65)
    assert KvBlocks([KvGroup(64, 5)]).fits(64)


def test_a_hit_in_a_group_with_a_window_needs_only_what_the_window_still_sees():
    kv = _kv(None, 20)
    first = _run(kv, sequence(tuple(range(100))), step=16)
    again = sequence(tuple(range(100)))
    assert kv.match(again) == 96
    assert kv.admit(again, 96, 4, 0)
    assert again.tables[0][:6] == first.tables[0][:6]
    # Token 96 sees 77 to 96.
    assert again.tables[1][:4] == [NULL_BLOCK] * 4
    assert again.tables[1][4] != NULL_BLOCK
    assert again.tables[1][5] == first.tables[1][5]
    kv.check([first, again])


def test_a_gap_in_a_window_shortens_the_hit():
    kv = KvBlocks([KvGroup(None, 100), KvGroup(20, 9)])
    kv.free(_run(kv, sequence(tuple(range(96))), step=16))
    assert kv.match(sequence(tuple(range(100)))) == 96
    _run(kv, sequence(100), step=16)
    found = kv.match(sequence(tuple(range(100))))
    assert found < 96, "blocks of the window were handed out meanwhile"
    each = sequence(tuple(range(100)))
    assert kv.admit(each, found, 1, 0)
    assert NULL_BLOCK not in each.tables[1][kv.groups[1].first_seen(found) :]


def test_a_pool_hands_out_every_block_but_the_null_block():
    pool = BlockPool(4)
    assert sorted(pool.take() for _ in range(3)) == [1, 2, 3]
    assert pool.available == 0
    assert pool.drop(2)
    assert pool.take() == 2


def test_a_pool_without_a_usable_block_is_refused():
    with pytest.raises(ValueError, match="2 or more"):
        BlockPool(1)


def test_check_names_what_is_lost():
    kv = _kv()
    each = _run(kv, sequence(20))
    with pytest.raises(AssertionError, match="owners"):
        kv.check()
    each.tables[0].pop()
    with pytest.raises(AssertionError, match="tables hold"):
        kv.check([each])


def test_a_block_is_sixteen_tokens():
    assert BLOCK_TOKENS == 16
