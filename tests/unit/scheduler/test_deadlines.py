"""Deadlines are told once, and cost nothing until one has come."""

from service.scheduler.deadlines import Deadlines
from tests.unit.scheduler.fakes import sequence


def test_the_late_are_told_once_and_soonest_first():
    deadlines = Deadlines()
    late, later, never = sequence(deadline=2.0), sequence(deadline=1.0), sequence()
    for each in (late, later, never):
        deadlines.watch(each)
    assert deadlines.passed(0.5) == []
    assert deadlines.passed(2.0) == [later, late]
    assert deadlines.passed(99.0) == []
    assert len(deadlines) == 0


def test_a_deadline_of_an_ended_sequence_never_comes():
    deadlines = Deadlines()
    ended, other = sequence(deadline=1.0), sequence(deadline=3.0)
    deadlines.watch(ended)
    deadlines.watch(other)
    deadlines.drop(ended)
    deadlines.drop(ended)
    assert deadlines.passed(2.0) == []
    assert deadlines.passed(3.0) == [other]
