"""Slots go by the line, and nobody starves behind experts that are always in use."""

from service.core import ExpertKey, Pattern
from service.gating.slot_line import SlotLine
from service.gating.slots import SlotPool

PATIENCE = 5.0


def _key(name: str) -> ExpertKey:
    return ExpertKey(name, 1)


def _pattern(names: str) -> Pattern:
    return Pattern(tuple((_key(name), 1.0) for name in sorted(names)))


def _keys(names: str) -> list[ExpertKey]:
    return [_key(name) for name in names]


def _line(
    slots: int | None, held: str = "", pinned: str = "", lookahead: int = 8
) -> tuple[SlotPool, SlotLine]:
    pool = SlotPool(max_experts=slots, pinned=pinned)
    for key in _keys(held):
        pool.place(key, 1)
    return pool, SlotLine(pool, PATIENCE, lookahead)


def test_missing_experts_are_wanted_in_the_order_of_the_line():
    _, line = _line(4, held="a")
    claim = line.claim(_keys("a"), map(_pattern, ["ca", "b", "c"]), (), 0.0)
    assert claim.missing == _keys("acb")[1:]
    assert list(claim.keep) == _keys("acb")


def test_a_pattern_that_does_not_fit_blocks_those_behind_it():
    _, line = _line(3, held="ab")
    claim = line.claim(_keys("ab"), map(_pattern, ["cd", "c"]), (), 0.0)
    assert claim.missing == []


def test_experts_of_requests_further_ahead_are_not_pushed_out():
    _, line = _line(2, held="ab")
    claim = line.claim([], map(_pattern, ["a", "c", "d"]), (), 0.0)
    assert claim.missing == _keys("c")
    assert set(claim.keep) == set(_keys("ac"))


def test_patterns_with_an_expert_that_cannot_be_had_are_passed_over():
    _, line = _line(2)
    claim = line.claim([], map(_pattern, ["ax", "b"]), {_key("x")}, 0.0)
    assert claim.missing == _keys("b")


def test_no_more_of_the_line_is_read_than_the_lookahead():
    _, line = _line(None, lookahead=2)
    waiting = iter([_pattern("a"), _pattern("b"), _pattern("c")])
    assert line.claim([], waiting, (), 0.0).missing == _keys("ab")
    assert next(waiting) == _pattern("c")


def test_after_its_patience_the_foremost_pattern_holds_newcomers_back():
    _, line = _line(2, held="ab")
    line.claim(_keys("ab"), [_pattern("c")], (), 0.0)
    assert line.admits(_pattern("a"))
    line.claim(_keys("ab"), [_pattern("c")], (), PATIENCE)
    assert line.draining
    held_back = [name for name in "ab" if not line.admits(_pattern(name))]
    assert len(held_back) == 1
    assert line.admits(_pattern("c"))


def test_draining_does_not_change_its_mind_about_whom_it_holds_back():
    _, line = _line(2, held="ab")
    line.claim(_keys("ab"), [_pattern("c")], (), 0.0)
    line.claim(_keys("ab"), [_pattern("c")], (), PATIENCE)
    line.claim(_keys("ba"), [_pattern("c")], (), PATIENCE + 1)
    assert line.admits(_pattern("a"))
    assert not line.admits(_pattern("b"))


def test_draining_lasts_until_the_experts_are_in_their_slots():
    pool, line = _line(2, held="ab")
    for now in (0.0, PATIENCE):
        line.claim(_keys("ab"), [_pattern("c")], (), now)
    claim = line.claim(_keys("a"), [_pattern("c")], (), PATIENCE + 1)
    assert claim.missing == _keys("c")
    assert line.draining
    pool.place(_key("c"), 1, claim.keep)
    line.claim(_keys("a"), [_pattern("c")], (), PATIENCE + 2)
    assert not line.draining


def test_draining_ends_when_the_request_goes_away():
    _, line = _line(2, held="ab")
    for now in (0.0, PATIENCE):
        line.claim(_keys("ab"), [_pattern("c")], (), now)
    line.claim(_keys("ab"), [], (), PATIENCE + 1)
    assert not line.draining


def test_patience_counts_while_the_experts_fit_now_and_then():
    _, line = _line(2, held="ab")
    line.claim(_keys("ab"), [_pattern("c")], (), 0.0)
    line.claim(_keys("a"), [_pattern("c")], (), PATIENCE / 2)
    line.claim(_keys("ab"), [_pattern("c")], (), PATIENCE)
    assert line.draining


def test_a_pattern_that_can_never_fit_waits_for_all_others_and_then_exceeds_the_capacity():
    _, line = _line(2, held="a")
    waiting = [_pattern("bcd")]
    assert line.claim(_keys("a"), waiting, (), 0.0).missing == []
    line.claim(_keys("a"), waiting, (), PATIENCE)
    assert not line.admits(_pattern("a"))
    claim = line.claim([], waiting, (), PATIENCE + 1)
    assert claim.over_capacity
    assert claim.missing == _keys("bcd")
    assert not line.admits(_pattern("a"))


def test_what_exceeds_the_capacity_is_kept_until_its_request_has_begun():
    pool, line = _line(2)
    for key in _keys("bcd"):
        pool.place(key, 1, _keys("bcd"), force=True)
    claim = line.claim([], [_pattern("bcd"), _pattern("a")], (), 0.0)
    assert pool.shrink(claim.keep) == []
    assert line.admits(_pattern("bcd"))


def test_pinned_experts_leave_the_rest_of_the_slots():
    _, line = _line(2, held="p", pinned="p")
    claim = line.claim([], map(_pattern, ["a", "b"]), (), 0.0)
    assert claim.missing == _keys("a")
    claim = line.claim([], [_pattern("ab")], (), 0.0)
    assert claim.over_capacity


def test_without_limits_everything_in_sight_is_wanted():
    _, line = _line(None, held="a")
    claim = line.claim([], map(_pattern, ["ab", "cd", ""]), (), 0.0)
    assert claim.missing == _keys("bcd")
    assert not line.draining
