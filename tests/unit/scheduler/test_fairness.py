"""Clients take turns by the tokens they got; idling earns nothing."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from service.scheduler.fairness import FairShare, LeastServed
from service.scheduler.policy import Policy
from tests.unit.scheduler.fakes import sequence


def test_prompt_and_generated_tokens_count_by_their_weights():
    shares = FairShare(Policy(prompt_weight=1.0, generated_weight=2.0))
    each = sequence(client="x")
    shares.enter(each)
    shares.charge(each, prompt=10)
    shares.charge(each, generated=3)
    assert shares.served == {"x": 16.0}


def test_a_client_that_comes_back_is_lifted_to_the_least_of_the_active_ones():
    shares = FairShare(Policy())
    x, y, z = (sequence(client=client) for client in "xyz")
    shares.enter(x)
    shares.charge(x, prompt=100)
    shares.enter(y)
    assert shares.served["y"] == 100
    shares.charge(y, prompt=50)
    shares.charge(x, prompt=20)
    shares.enter(z)
    assert shares.served["z"] == 120


def test_a_client_that_comes_back_keeps_its_debt():
    shares = FairShare(Policy())
    x, y = sequence(client="x"), sequence(client="y")
    shares.enter(x)
    shares.enter(y)
    shares.charge(x, prompt=500)
    shares.leave(x)
    shares.enter(sequence(client="x"))
    assert shares.served["x"] == 500


def test_counters_end_with_the_busy_period():
    shares = FairShare(Policy())
    x = sequence(client="x")
    shares.enter(x)
    shares.charge(x, prompt=500)
    shares.leave(x)
    assert shares.served == {}
    shares.check(Counter())


def test_without_fair_share_all_count_as_one_client():
    shares = FairShare(Policy(fair_share=False))
    assert shares.client(sequence(client="x")) == shares.client(sequence(client="y"))


@given(
    st.lists(
        st.tuples(st.sampled_from("abcdef"), st.sampled_from(["add", "discard", "serve"]), st.integers(0, 9))
    )
)
def test_the_first_is_always_one_of_the_least_served(moves):
    served = dict.fromkeys("abcdef", 0.0)
    members: set[str] = set()
    order = LeastServed(served)
    for client, move, tokens in moves:
        if move == "add":
            order.add(client)
            members.add(client)
        elif move == "discard":
            order.discard(client)
            members.discard(client)
        else:
            served[client] += tokens
        seen: list[str] = []
        assert order.first(seen.append) is None
        assert set(seen) == members
        assert [served[each] for each in seen] == sorted(served[each] for each in seen)
        assert len(order) == len(members)
        assert set(order.roughly()) == members


def test_a_long_list_of_clients_is_not_searched_to_its_end():
    served = {str(number): 0.0 for number in range(1000)}
    order = LeastServed(served)
    for client in served:
        order.add(client)
    asked: list[str] = []
    assert order.first(asked.append) is None
    assert len(asked) == 64


def test_clients_that_come_and_go_leave_nothing_behind():
    served = {"stays": 0.0, "flits": 5.0}
    order = LeastServed(served)
    order.add("stays")
    for _ in range(100):
        order.add("flits")
        order.discard("flits")
    assert len(order._heap) <= 2
