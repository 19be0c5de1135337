"""The pool of expert slots: bounded, least recently used out first, what must stay stays."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.core import ExpertKey
from service.gating.slots import Reservation, SlotPool


def _key(name: str) -> ExpertKey:
    return ExpertKey(name, 1)


A, B, C, D = (_key(name) for name in "abcd")


def _filled(*keys: ExpertKey, **limits) -> SlotPool:
    pool = SlotPool(**limits)
    for key in keys:
        assert pool.place(key, 10) is not None
    return pool


def test_without_limits_nobody_goes():
    pool = _filled(A, B, C, D)
    assert not pool.limited
    assert pool.keys() == [A, B, C, D]
    assert pool.used_bytes == 40


def test_the_least_recently_used_expert_goes_first():
    pool = _filled(A, B, C, max_experts=3)
    pool.touch([A])
    assert pool.place(D, 10) == [B]
    assert pool.keys() == [C, A, D]


def test_a_large_expert_pushes_out_as_many_as_it_takes():
    pool = _filled(A, B, C, max_bytes=30)
    assert pool.place(D, 20) == [A, B]
    assert pool.used_bytes == 30


def test_experts_in_use_stay_however_long_ago_they_were_placed():
    pool = _filled(A, B, max_experts=2)
    assert pool.place(C, 10, keep={A}) == [B]


def test_without_room_nothing_changes():
    pool = _filled(A, B, max_experts=2)
    assert pool.place(C, 10, keep={A, B}) is None
    assert pool.keys() == [A, B]
    assert pool.used_bytes == 20


def test_pinned_experts_stay_in_all_their_generations():
    pool = _filled(A, B, max_experts=2, pinned=["a"])
    assert pool.place(ExpertKey("a", 2), 10) == [B]
    assert pool.place(C, 10) is None


def test_one_that_must_come_exceeds_the_capacity_and_the_excess_is_reported():
    pool = _filled(A, B, max_experts=2, max_bytes=20)
    assert pool.excess == (0, 0)
    assert pool.place(C, 15, keep={A, B}, force=True) == []
    assert pool.excess == (1, 15)
    assert pool.shrink({C}) == [A, B]
    assert pool.excess == (0, 0)


def test_a_forced_expert_pushes_out_all_that_need_not_stay():
    pool = _filled(A, B, max_bytes=20)
    assert pool.place(C, 15, keep={A}, force=True) == [B]
    assert pool.excess == (0, 5)


def test_an_expert_that_is_in_is_only_touched():
    pool = _filled(A, B, max_experts=2)
    assert pool.place(A, 10) == []
    assert pool.keys() == [B, A]
    assert pool.used_bytes == 20


def test_sizes_outlive_slots_until_the_generation_is_forgotten():
    pool = _filled(A, max_experts=1)
    pool.place(B, 30)
    assert pool.size(A) == 10
    assert pool.size(C) == 20
    pool.forget(A)
    assert pool.size(A) == 30
    pool.forget(B)
    assert (pool.size(B), pool.used_bytes, len(pool)) == (0, 0, 0)


def test_a_size_learned_late_corrects_the_bytes_in_use():
    pool = _filled(A, max_bytes=100)
    pool.learn(A, 25)
    assert pool.used_bytes == 25
    pool.remove(A)
    assert pool.used_bytes == 0


@pytest.mark.parametrize("limits", [{"max_experts": 0}, {"max_bytes": -1}])
def test_a_pool_without_any_place_is_refused(limits):
    with pytest.raises(ValueError, match="no place"):
        SlotPool(**limits)


def test_a_reservation_counts_pinned_experts_and_each_expert_once():
    pool = _filled(A, B, max_experts=3, pinned=["a"])
    reserved = Reservation(pool, [B, B])
    assert reserved.extend([B, C])
    assert not reserved.extend([D])
    assert D not in reserved
    assert reserved.extend([A, C])


KEYS = st.sampled_from([ExpertKey(name, generation) for name in "abcdefgh" for generation in (1, 2)])
SIZES = {
    ExpertKey(name, generation): 3 * i + generation
    for i, name in enumerate("abcdefgh")
    for generation in (1, 2)
}
ACTIONS = st.one_of(
    st.tuples(st.just("place"), KEYS, st.frozensets(KEYS, max_size=5), st.booleans()),
    st.tuples(st.just("touch"), st.lists(KEYS, max_size=4)),
    st.tuples(st.just("shrink"), st.frozensets(KEYS, max_size=5)),
    st.tuples(st.just("remove"), KEYS),
    st.tuples(st.just("forget"), KEYS),
)


@given(
    max_experts=st.none() | st.integers(1, 6),
    max_bytes=st.none() | st.integers(1, 60),
    pinned=st.frozensets(st.sampled_from("abcdefgh"), max_size=3),
    actions=st.lists(ACTIONS, max_size=40),
)
def test_whatever_happens_the_pool_keeps_its_promises(max_experts, max_bytes, pinned, actions):
    pool = SlotPool(max_experts=max_experts, max_bytes=max_bytes, pinned=pinned)
    order: list[ExpertKey] = []  # least recently used first, by the plainest means
    for action, *arguments in actions:
        before = list(order)
        if action == "place":
            key, keep, force = arguments
            known = key in pool
            victims = pool.place(key, SIZES[key], keep, force=force)
            if victims is None:
                assert not known
                assert not force
                stay = [k for k in order if k in keep or k.name in pinned]
                assert not pool.room_for(len(stay) + 1, sum(map(SIZES.get, stay)) + SIZES[key])
            else:
                _check_victims(victims, before, keep, pinned)
                order = [k for k in order if k not in victims and k != key] + [key]
                if not known and any(pool.excess):
                    assert all(k in keep or k.name in pinned or k == key for k in order)
        elif action == "touch":
            for key in arguments[0]:
                if key in order:
                    order.remove(key)
                    order.append(key)
            pool.touch(arguments[0])
        elif action == "shrink":
            victims = pool.shrink(arguments[0])
            _check_victims(victims, before, arguments[0], pinned)
            order = [k for k in order if k not in victims]
            assert not any(pool.excess) or all(k in arguments[0] or k.name in pinned for k in order)
        else:
            getattr(pool, action)(arguments[0])
            order = [k for k in order if k != arguments[0]]
        assert pool.keys() == order
        assert len(pool) == len(order)
        assert pool.used_bytes == sum(SIZES[key] for key in order)
        assert set(pool.pinned) == {key for key in order if key.name in pinned}


def _check_victims(victims, order, keep, pinned):
    """They are the least recently used of those that may go."""
    free = [key for key in order if key not in keep and key.name not in pinned]
    assert victims == free[: len(victims)]
