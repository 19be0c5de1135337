"""Generations stay while a lease holds them, whatever operators do."""

import pytest

from service.core import ExpertKey
from service.errors import UnknownExpertError
from service.scheduler.catalogue import Catalogue


def test_a_lease_keeps_the_generation_it_was_taken_on():
    catalogue = Catalogue()
    catalogue.switch([ExpertKey("a", 1)])
    pattern = catalogue.lease({"a": 0.5})
    assert catalogue.switch([ExpertKey("a", 2)]) == []
    assert pattern.gates == ((ExpertKey("a", 1), 0.5),)
    assert catalogue.lease({"a": 1.0}).gates == ((ExpertKey("a", 2), 1.0),)
    assert catalogue.release(pattern) == [ExpertKey("a", 1)]


def test_an_unused_generation_is_free_at_once_when_replaced_or_retired():
    catalogue = Catalogue()
    catalogue.switch([ExpertKey("a", 1)])
    assert catalogue.switch([ExpertKey("a", 2)]) == [ExpertKey("a", 1)]
    assert catalogue.switch(retire=["a"]) == [ExpertKey("a", 2)]
    assert catalogue.leases() == {}


def test_a_retired_expert_is_refused_by_name_but_running_leases_end_normally():
    catalogue = Catalogue()
    catalogue.switch([ExpertKey("a", 1)])
    pattern = catalogue.lease({"a": 1.0})
    assert catalogue.switch(retire=["a"]) == []
    with pytest.raises(UnknownExpertError, match=r"no expert named 'a'; registered: none"):
        catalogue.lease({"a": 1.0})
    assert catalogue.release(pattern) == [ExpertKey("a", 1)]


def test_an_unknown_name_holds_nothing():
    catalogue = Catalogue()
    catalogue.switch([ExpertKey("a", 1)])
    with pytest.raises(UnknownExpertError) as caught:
        catalogue.lease({"a": 1.0, "b": 1.0})
    assert caught.value.param == "gates.b"
    assert catalogue.leases() == {ExpertKey("a", 1): 0}


def test_zero_gates_are_dropped_and_order_does_not_matter():
    catalogue = Catalogue()
    for name in "abc":
        catalogue.switch([ExpertKey(name, 1)])
    assert catalogue.lease({"c": 0.25, "a": 0.75, "b": 0.0}) == catalogue.lease({"a": 0.75, "c": 0.25})


def test_publishing_the_same_generation_again_changes_nothing():
    catalogue = Catalogue()
    catalogue.switch([ExpertKey("a", 1)])
    pattern = catalogue.lease({"a": 1.0})
    assert catalogue.switch([ExpertKey("a", 1)]) == []
    assert catalogue.leases() == {ExpertKey("a", 1): 1}
    assert catalogue.release(pattern) == []
