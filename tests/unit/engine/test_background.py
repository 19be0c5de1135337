import os
import threading

import pytest

from service.engine.background import background_thread


@pytest.mark.skipif(not hasattr(os, "setpriority"), reason="threads have no priority of their own here")
def test_work_beside_the_engine_runs_at_a_lower_priority_than_whoever_asks_for_it():
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    with background_thread("beside") as executor:
        found = executor.submit(lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id())).result()
    assert found == min(own + 10, 19)
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == own
