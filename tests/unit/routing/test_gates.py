"""Gates: what a request gets from the router's probabilities."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experts.errors import RoutingError
from experts.routing import select_gates

NAMES = ("a", "b", "c", "d")


def test_the_largest_probabilities_are_kept_and_renormalised():
    assert select_gates([0.5, 0.1, 0.3, 0.1], NAMES, 2, 0.0) == {"a": 40 / 64, "c": 24 / 64}


def test_a_certain_router_gives_one_gate_of_exactly_one():
    assert select_gates([0.0, 1.0, 0.0, 0.0], NAMES, 4, 0.0) == {"b": 1.0}


def test_probabilities_below_the_threshold_are_dropped():
    assert select_gates([0.9, 0.06, 0.04, 0.0], NAMES, 4, 0.1) == {"a": 1.0}


def test_no_gate_is_left_when_none_reaches_the_threshold():
    assert select_gates([0.25, 0.25, 0.25, 0.25], NAMES, 4, 0.3) == {}


def test_equal_probabilities_keep_the_earlier_name():
    assert select_gates([0.25, 0.25, 0.25, 0.25], NAMES, 1, 0.0) == {"a": 1.0}


def test_a_tensor_row_is_read_like_a_list():
    row = torch.tensor([0.5, 0.25, 0.25, 0.0])
    assert select_gates(row, NAMES, 4, 0.0) == select_gates(row.tolist(), NAMES, 4, 0.0)


def test_the_quantum_can_be_coarser():
    assert select_gates([0.6, 0.4], ("a", "b"), 2, 0.0, quantum=1 / 2) == {"a": 0.5, "b": 0.5}


@pytest.mark.parametrize(
    ("row", "options", "says"),
    [
        ([0.5], {}, "1 probabilities for 4 experts"),
        ([math.nan, 0, 0, 1], {}, "non-finite"),
        ([-0.1, 0, 0, 1.1], {}, "negative"),
        ([1, 0, 0, 0], {"top_k": 0}, "top_k 0"),
        ([1, 0, 0, 0], {"threshold": 1.5}, "threshold 1.5"),
        ([1, 0, 0, 0], {"quantum": 0.3}, "quantum 0.3"),
        ([1, 0, 0, 0], {"quantum": 0}, "quantum 0"),
    ],
)
def test_impossible_input_is_refused(row, options, says):
    with pytest.raises(RoutingError, match=says):
        select_gates(row, NAMES, **{"top_k": 2, "threshold": 0.0} | options)


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=12),
    st.integers(1, 12),
    st.floats(0, 1),
    st.sampled_from([2, 10, 64, 100]),
)
def test_gates_are_few_positive_multiples_of_the_quantum_that_sum_to_one(row, top_k, threshold, units):
    names = [f"e{i}" for i in range(len(row))]
    gates = select_gates(row, names, top_k, threshold, 1 / units)
    assert len(gates) <= top_k
    assert list(gates.values()) == sorted(gates.values(), reverse=True)
    counts = [weight * units for weight in gates.values()]
    assert all(count >= 0.999 and math.isclose(count, round(count)) for count in counts)
    assert not gates or round(sum(counts)) == units
    assert all(row[names.index(name)] >= threshold for name in gates)
    assert bool(gates) == any(p >= threshold and p > 0 for p in row)
