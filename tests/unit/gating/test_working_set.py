"""The packed factors follow the active experts with as little copying as possible."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from service.core import ExpertKey
from service.gating.resident import MatrixFactors, ResidentExpert
from service.gating.working_set import WorkingSet

NAMES = ("first", "second")


def _expert(index: int, ranks: tuple[int, int] = (2, 3), vector: bool = False) -> ResidentExpert:
    generator = torch.Generator().manual_seed(index)
    matrices = {
        name: MatrixFactors(
            torch.randn(rank, 4, generator=generator), torch.randn(rank, 5, generator=generator)
        )
        for name, rank in zip(NAMES, ranks, strict=True)
        if rank
    }
    vectors = {"bias": torch.randn(5, generator=generator)} if vector else {}
    return ResidentExpert(ExpertKey(f"e{index}", 1), matrices, vectors)


def _set(*experts: ResidentExpert, fine: bool = True) -> tuple[WorkingSet, dict[ExpertKey, ResidentExpert]]:
    return WorkingSet(NAMES, ["bias"], fine=fine), {expert.key: expert for expert in experts}


def _mix(working: WorkingSet, name: str, gates: dict[ExpertKey, float], fine: bool) -> torch.Tensor:
    """Σ g·aᵀb as the packed factors give it."""
    buffer = working.matrices[name]
    table = torch.tensor([[gates.get(key, 0.0) for key in working.segments]])
    wide = working.spread(table, working.layouts[buffer.layout])
    packed = buffer.fine if fine else buffer.native
    return packed.a.t() @ (wide.t() * packed.b)


def test_a_newly_active_expert_is_appended_without_repacking():
    first, second = _expert(0), _expert(1)
    working, resident = _set(first, second)
    assert working.ensure([first.key], resident).repacked
    change = working.ensure([first.key, second.key], resident)
    assert (change.appended, change.repacked) == (1, False)
    assert working.segments == [first.key, second.key]


def test_an_active_set_that_shrinks_copies_nothing():
    experts = [_expert(i) for i in range(3)]
    working, resident = _set(*experts)
    working.ensure(resident, resident)
    assert not working.ensure([experts[1].key], resident).any


def test_idle_experts_are_dropped_once_they_outweigh_the_active_ones():
    experts = [_expert(i) for i in range(4)]
    working, resident = _set(*experts)
    working.ensure([e.key for e in experts[:3]], resident)
    change = working.ensure([experts[3].key], resident)
    assert change.repacked
    assert working.segments == [experts[3].key]


def test_a_settled_set_stops_carrying_idle_experts_after_some_steps():
    experts = [_expert(i) for i in range(3)]
    working, resident = _set(*experts)
    working.ensure(resident, resident)
    changes = [working.ensure([experts[1].key], resident).repacked for _ in range(20)]
    assert changes.count(True) == 1
    assert not changes[0]
    assert working.segments == [experts[1].key]


def test_an_expert_that_is_not_resident_is_a_broken_lease():
    working, _ = _set()
    with pytest.raises(KeyError):
        working.ensure([ExpertKey("ghost", 1)], {})


def test_a_failed_append_leaves_a_set_that_can_be_packed_again(monkeypatch):
    first, second = _expert(0), _expert(1)
    working, resident = _set(first, second)
    working.ensure([first.key], resident)
    broken = working.matrices["second"]
    monkeypatch.setattr(type(broken.native), "append", _out_of_memory)
    with pytest.raises(MemoryError):
        working.ensure([first.key, second.key], resident)
    monkeypatch.undo()
    assert working.ensure([first.key, second.key], resident).repacked
    assert working.matrices["second"].ranks == [3, 3]


def _out_of_memory(*_):
    raise MemoryError


def test_released_memory_is_given_back():
    expert = _expert(0)
    working, resident = _set(expert)
    working.ensure([expert.key], resident)
    held = working.nbytes
    working.clear()
    assert working.nbytes == held
    working.clear(release=True)
    assert working.nbytes == 0


def test_vectors_of_experts_without_one_count_as_zero():
    with_bias, without = _expert(0, vector=True), _expert(1)
    working, resident = _set(with_bias, without)
    working.ensure([without.key], resident)
    assert working.vectors["bias"].stacked is None
    working.ensure([without.key, with_bias.key], resident)
    stacked = working.vectors["bias"].stacked
    assert torch.equal(stacked, torch.stack([torch.zeros(5), with_bias.vectors["bias"]]))


def test_without_fine_copies_none_are_kept():
    expert = _expert(0)
    working, resident = _set(expert, fine=False)
    working.ensure([expert.key], resident)
    assert working.matrices["first"].fine is None


@given(
    ranks=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=6),
    steps=st.lists(st.sets(st.integers(0, 5)), min_size=1, max_size=8),
)
def test_whatever_came_before_the_packed_factors_equal_the_experts_own(ranks, steps):
    experts = [_expert(i, pair) for i, pair in enumerate(ranks)]
    working, resident = _set(*experts)
    for wanted in steps:
        active = [experts[i] for i in sorted(wanted) if i < len(experts)]
        if not active:
            continue
        working.ensure([e.key for e in active], resident)
        gates = {e.key: 0.5 + i for i, e in enumerate(active)}
        for name in NAMES:
            expected = torch.zeros(4, 5)
            for expert in active:
                factors = expert.matrices.get(name)
                if factors is not None:
                    expected += gates[expert.key] * factors.a.t() @ factors.b
            if working.matrices[name].rows == 0:
                assert not expected.any()
                continue
            for fine in (True, False):
                torch.testing.assert_close(_mix(working, name, gates, fine), expected)
