"""Who is next: the starved, then priority, then whoever got least, then experts at hand, then arrival."""

import itertools

from service.scheduler.experts import ActiveExperts
from service.scheduler.fairness import FairShare
from service.scheduler.policy import Policy
from service.scheduler.prefix import root_of
from service.scheduler.waiting import WaitingLine
from tests.unit.scheduler.fakes import pattern, sequence


class _Door:
    """A line at time 0 whose sequences arrive in order of creation."""

    def __init__(self, *, running=(), bound=None, absent=(), fair=True, max_wait=10.0):
        self.shares = FairShare(Policy(fair_share=fair))
        self.line = WaitingLine(max_wait, self.shares)
        self._numbers = itertools.count()
        self._running, self._bound, self._absent = running, bound, set(absent)

    def push(self, each, now=0.0, **options):
        root_of(each)
        each.rank = each.rank if each.preemptions else (each.request.priority, next(self._numbers))
        self.shares.enter(each)
        self.line.push(each, now, **options)
        self.line.check()
        return each

    def experts(self):
        return ActiveExperts(self._running, self._bound, lambda wanted: wanted not in self._absent)

    def first(self, now=0.0):
        return self.line.first(now, self.experts())

    def order(self, now=0.0):
        """Everybody who can go, one after another."""
        gone = []
        while (each := self.first(now)) is not None:
            self.line.drop(each)
            self.line.check()
            gone.append(each)
        return gone


def test_equals_go_by_arrival_whatever_their_pattern():
    door = _Door()
    arrived = [door.push(sequence(gates=pattern(name))) for name in "abacabba"]
    assert door.order() == arrived
    assert len(door.line) == 0


def test_priority_goes_before_arrival_lower_first():
    door = _Door()
    late, normal, urgent = (door.push(sequence(priority=priority)) for priority in (1, 0, -1))
    assert door.order() == [urgent, normal, late]


def test_the_client_that_got_least_goes_first_within_a_priority():
    door = _Door()
    x1, x2 = door.push(sequence(client="x")), door.push(sequence(client="x"))
    y, urgent = door.push(sequence(client="y")), door.push(sequence(client="x", priority=-1))
    door.shares.charge(x1, prompt=10)
    assert door.order() == [urgent, y, x1, x2]


def test_without_fair_share_clients_go_by_arrival():
    door = _Door(fair=False)
    x, y = door.push(sequence(client="x")), door.push(sequence(client="y"))
    door.shares.charge(x, prompt=10)
    assert door.order() == [x, y]


def test_a_preempted_sequence_goes_first_within_its_priority():
    door = _Door()
    urgent, waiting = door.push(sequence(priority=-1)), door.push(sequence())
    back = sequence()
    back.rank, back.preemptions = (0, -1), 1
    door.push(back)
    assert door.order() == [urgent, back, waiting]


def test_whoever_waited_too_long_goes_strictly_by_arrival():
    door = _Door(max_wait=10.0)
    old = door.push(sequence(priority=5), now=0.0)
    older_than_urgent = door.push(sequence(priority=9), now=1.0)
    urgent = door.push(sequence(priority=-5), now=9.0)
    assert door.first(10.0) is urgent
    assert door.order(11.1) == [old, older_than_urgent, urgent]


def test_experts_at_hand_go_first_while_others_would_widen_the_set_too_far():
    running = [sequence(gates=pattern("a", "b"))]
    door = _Door(running=running, bound=2)
    other, same, shared = (
        door.push(sequence(gates=gates)) for gates in (pattern("c"), pattern("b"), pattern())
    )
    assert door.order() == [same, shared, other], "a soft bound: in the end all go"


def test_a_set_below_its_bound_may_grow():
    door = _Door(running=[sequence(gates=pattern("a"))], bound=3)
    new, same = door.push(sequence(gates=pattern("b", "c"))), door.push(sequence(gates=pattern("a")))
    assert door.order() == [new, same]


def test_a_set_beyond_its_bound_prefers_who_adds_nothing_then_arrival():
    door = _Door(running=[sequence(gates=pattern("a", "b", "c"))], bound=2)
    new, newer, same = (door.push(sequence(gates=pattern(name))) for name in "dea")
    assert door.order() == [same, new, newer]


def test_affinity_does_not_cross_clients():
    door = _Door(running=[sequence(gates=pattern("a"))], bound=1)
    x, y = (
        door.push(sequence(gates=pattern("a"), client="x")),
        door.push(sequence(gates=pattern("b"), client="y")),
    )
    door.shares.charge(x, prompt=1)
    assert door.first() is y


def test_absent_experts_are_passed_over_without_losing_their_place():
    cold = pattern("cold")
    door = _Door(absent=[cold])
    waits, goes = door.push(sequence(gates=cold)), door.push(sequence(gates=pattern("a")))
    assert door.order() == [goes]
    door._absent.clear()
    door.push(sequence(gates=pattern("a")))
    assert door.first() is waits


def test_a_starved_sequence_whose_experts_are_absent_holds_back_all_who_take_slots():
    cold = pattern("cold")
    door = _Door(absent=[cold], max_wait=10.0)
    starved = door.push(sequence(gates=cold), now=0.0)
    slots, none = door.push(sequence(gates=pattern("a")), now=5.0), door.push(sequence(), now=5.0)
    assert door.first(9.0) is slots
    assert door.order(11.0) == [none]
    door._absent.clear()
    assert door.order(11.0) == [starved, slots]


def test_a_parked_sequence_is_nobodys_next_until_it_is_released_to_its_old_place():
    door = _Door()
    parked, later = door.push(sequence(), parked=True), door.push(sequence())
    assert len(door.line) == 2
    assert door.first() is later
    assert door.first(99.0) is later, "nor when it is starved"
    door.line.release(parked)
    assert door.order() == [parked, later]


def test_anybody_can_leave_from_anywhere():
    door = _Door()
    names = "aabbcc"
    line = [door.push(sequence(gates=pattern(name), client=name)) for name in names]
    back = sequence()
    back.preemptions = 1
    line += [door.push(back), door.push(sequence(), parked=True), door.push(sequence(priority=3))]
    for each in (line[1], line[6], line[4], line[0], line[7], line[8], line[3], line[2], line[5]):
        assert each in door.line
        door.line.drop(each)
        door.line.check()
        assert each not in door.line
    assert door.first() is None


def test_waiting_patterns_are_told_once_the_longest_waiting_first():
    door = _Door()
    door.push(sequence(gates=pattern("late"), priority=5))
    for name in "abab":
        door.push(sequence(gates=pattern(name)))
    door.push(sequence(gates=pattern("urgent"), priority=-1))
    told = [str(each) for each in door.line.patterns()]
    assert told == ["late@1:1", "urgent@1:1", "a@1:1", "b@1:1"]


def test_a_choice_looks_at_a_bounded_part_of_a_long_line():
    door = _Door()
    asked = []
    experts = ActiveExperts([], None, lambda wanted: bool(asked.append(wanted)))
    for number in range(300):
        door.push(sequence(1, pattern(f"e{number}")))
    assert door.line.first(0.0, experts) is None
    assert len(asked) == 64
    door.push(sequence(1, pattern("other"), client="other"))
    assert door.line.first(0.0, experts) is None
    assert len(asked) == 65, "each pattern is asked once a step"
