"""Many connections and random cancels against a server in a process of its own: the short forms of benchmarks/api."""

import pytest

from benchmarks.api import connections, soak
from tests.fixtures.tiny import TinyFamily

_MIB = 2**20


@pytest.mark.timeout(600)
def test_hundreds_of_connections_wait_together_and_each_gets_its_own_answer(family: TinyFamily) -> None:
    held = connections.run(family.bundle, 200, tokens=8)
    assert held.together == held.distinct == 200
    assert held.lost == held.wrong == 0, held.complaints
    assert held.after.idle
    assert held.after.tasks <= held.before.tasks
    assert held.after.descriptors <= held.before.descriptors
    assert held.growth < 128 * _MIB


@pytest.mark.timeout(600)
def test_clients_that_leave_at_random_leave_nothing_behind(family: TinyFamily) -> None:
    soaked = soak.run(family.bundle, seconds=20)
    assert not soaked.wrong, soaked.wrong[:5]
    assert soaked.done["hung up"] >= 10
    assert soaked.done["whole"] + soaked.done["streamed"] >= 20
    assert soaked.after.idle
    assert not any(count > 0 for count in soaked.leaks.values()), soaked.leaks
