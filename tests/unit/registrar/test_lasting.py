"""What shall go on for ever begins anew after any fault, each time a little later, and never by halves."""

import asyncio
import logging

import pytest

from service.registrar.lasting import lasting


class World:
    """Work that fails as often as told, and time that passes while it runs and waits.

    Attributes:
        told: what happened, in order.
    """

    def __init__(self, *, faults: int, seconds: float = 0.0, stuck: int = 0) -> None:
        self.told: list[str | float] = []
        self._faults = faults
        self._seconds = seconds
        self._stuck = stuck
        self._now = 0.0

    async def work(self) -> None:
        self.told.append("work")
        self._now += self._seconds
        if self._faults:
            self._faults -= 1
            raise RuntimeError("a fault")

    async def recover(self) -> None:
        self.told.append("recover")
        if self._stuck:
            self._stuck -= 1
            raise RuntimeError("another fault")

    async def sleep(self, seconds: float) -> None:
        self.told.append(seconds)
        self._now += seconds

    def run(self) -> list[str | float]:
        asyncio.run(lasting(self.work, self.recover, what="it", clock=lambda: self._now, sleep=self.sleep))
        return self.told


def test_work_without_a_fault_is_done_once() -> None:
    assert World(faults=0).run() == ["work"]


def test_each_fault_is_put_right_at_once_and_the_pause_grows_to_a_bound(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.ERROR):
        told = World(faults=9).run()
    assert told[:6] == ["work", "recover", 0.5, "work", "recover", 1.0]
    assert [it for it in told if isinstance(it, float)] == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]
    assert len([record for record in caplog.records if record.exc_info]) == 9
    assert "it has failed by a fault" in caplog.text


def test_after_a_long_time_without_a_fault_the_pause_is_short_again() -> None:
    told = World(faults=3, seconds=31.0).run()
    assert [it for it in told if isinstance(it, float)] == [0.5, 0.5, 0.5]


def test_what_cannot_be_put_right_is_tried_until_it_is_and_nothing_begins_before() -> None:
    told = World(faults=1, stuck=2).run()
    assert told == ["work", "recover", 0.5, "recover", 0.5, "recover", 0.5, "work"]


def test_whoever_is_cancelled_begins_nothing_anew() -> None:
    async def go() -> list[str]:
        told: list[str] = []

        async def work() -> None:
            told.append("work")
            await asyncio.Event().wait()

        async def recover() -> None:
            told.append("recover")

        task = asyncio.create_task(lasting(work, recover, what="it"))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()
        return told

    assert asyncio.run(go()) == ["work"]
