"""A server collects and prunes by itself, every so often; no time passes here but when a test says so."""

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from sqlalchemy import create_engine, select, update

from experts.bundle_manifest import FileEntry
from experts.errors import BlobError, CatalogueError
from experts.registry.blobs import Blobs
from experts.registry.catalogue import Catalogue, pruning, tables
from experts.registry.records import Actor, JobFailure
from service.registrar import caretaker
from service.registrar.calls import Calls
from service.registrar.caretaker import Caretaker
from service.registry_metrics import RegistryMetrics
from tests.unit.registry.catalogue import adopt, register, submit

SECONDS = 3600.0


class Sleep:
    """Waits of a round end when a test says so; shorter ones at once."""

    def __init__(self) -> None:
        self.asked: list[float] = []
        self._asleep = asyncio.Event()
        self._wake = asyncio.Event()

    async def __call__(self, seconds: float) -> None:
        self.asked.append(seconds)
        if seconds < SECONDS:
            return
        self._asleep.set()
        await self._wake.wait()
        self._wake.clear()

    async def begun(self) -> None:
        """The caretaker sleeps."""
        await self._asleep.wait()

    async def round(self) -> None:
        """It wakes up, does its work and sleeps again."""
        await self.begun()
        self._asleep.clear()
        self._wake.set()
        await self.begun()


class Now:
    """A wall clock that a test sets."""

    def __init__(self) -> None:
        self.ahead = timedelta()

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.ahead


class Fixture:
    """A catalogue, blobs, and what takes care of them."""

    def __init__(self, folder: Path) -> None:
        self.url = f"sqlite:///{folder / 'catalogue.sqlite'}"
        self.catalogue = Catalogue.open(self.url)
        adopt(self.catalogue)
        self.folder = folder / "blobs"
        self.blobs = Blobs.open(str(self.folder), folder / "cache")
        self.calls = Calls(1)
        self.registry = CollectorRegistry()
        self.now = Now()

    def counted(self, kind: str) -> float:
        value = self.registry.get_sample_value("twinserve_registry_collected_total", {"kind": kind})
        assert value is not None
        return value

    def old_blob(self, text: str) -> FileEntry:
        """One that nothing needs, stored two hours ago."""
        entry = self.blobs.put_bytes(text.encode())
        long_ago = time.time() - 7200
        os.utime(self.folder / "sha256" / entry.sha256[:2] / entry.sha256, (long_ago, long_ago))
        return entry

    def age(self, by: timedelta) -> None:
        """Let all that was done so far lie further back."""
        engine = create_engine(self.url)
        with engine.begin() as connection:
            for column in (
                tables.jobs.c.ended,
                tables.generations.c.created,
                tables.experts.c.updated,
                tables.audit.c.at,
            ):
                for moment in connection.execute(select(column).distinct()).scalars().all():
                    if moment is not None:
                        connection.execute(
                            update(column.table).where(column == moment).values({column: moment - by})
                        )
        engine.dispose()

    def run(
        self, act: Callable[[Sleep], Coroutine[Any, Any, None]], *, jobs_days: int = 30, audit_days: int = 365
    ) -> None:
        """Take care while a test acts."""

        async def both() -> None:
            sleep = Sleep()
            care = Caretaker(
                self.catalogue,
                self.blobs,
                self.calls,
                RegistryMetrics(self.registry),
                seconds=SECONDS,
                keep_generations=2,
                keep_jobs_days=jobs_days,
                keep_audit_days=audit_days,
                sleep=sleep,
                now=self.now,
                spread=lambda: 0.5,
            )
            task = asyncio.create_task(care.run())
            try:
                async with asyncio.timeout(60):
                    await act(sleep)
                assert not task.done()
            finally:
                task.cancel()
                ended = await asyncio.gather(task, return_exceptions=True)
            assert isinstance(ended[0], asyncio.CancelledError)

        asyncio.run(both())


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Fixture]:
    made = Fixture(tmp_path)
    yield made
    made.calls.close()
    made.catalogue.close()
    made.blobs.close()


def fail(catalogue: Catalogue, name: str) -> str:
    submit(catalogue, name)
    job = catalogue.claim("replica")
    assert job is not None
    return catalogue.fail(job.id, job.attempt, JobFailure("expert_rejected", "no")).id


def test_nothing_happens_before_the_first_interval_is_over_and_waits_differ(registry: Fixture) -> None:
    registry.old_blob("nobody's")

    async def act(sleep: Sleep) -> None:
        await sleep.begun()
        assert sleep.asked == [SECONDS * 1.1]
        assert len(list(registry.blobs.list())) == 1
        await sleep.round()
        assert sleep.asked == [SECONDS * 1.1] * 2

    registry.run(act)
    assert list(registry.blobs.list()) == []


def test_old_generations_and_unneeded_blobs_go_and_are_counted(registry: Fixture) -> None:
    for _ in range(3):
        register(registry.catalogue, "a")
    registry.old_blob("nobody's")
    young = registry.blobs.put_bytes(b"stored just now")

    async def act(sleep: Sleep) -> None:
        await sleep.round()
        assert {it.number: it.state for it in registry.catalogue.generations("a")} == {
            6: "ready",
            5: "ready",
            4: "collected",
            3: "collected",
        }
        [line, *_] = registry.catalogue.audit(target="a")
        assert (line.action, line.actor) == ("collect", Actor("system"))
        await sleep.round()

    registry.run(act)
    assert [blob.sha256 for blob in registry.blobs.list()] == [young.sha256]
    assert (registry.counted("generations"), registry.counted("blobs")) == (2, 1)


@pytest.mark.parametrize(("days", "age", "left"), [(30, 29, [6, 5]), (30, 31, []), (0, 10_000, [6, 5])])
def test_an_expert_that_was_retired_by_mistake_can_come_back_for_as_long_as_jobs_are_listed(
    registry: Fixture, days: int, age: int, left: list[int]
) -> None:
    for _ in range(3):
        register(registry.catalogue, "a")
    registry.catalogue.set_state("a", "retired", Actor("hasty"))
    registry.age(timedelta(days=age))
    submit(registry.catalogue, "b")

    async def act(sleep: Sleep) -> None:
        await sleep.round()

    registry.run(act, jobs_days=days)
    assert [it.number for it in registry.catalogue.generations("a") if it.state == "ready"] == left
    if left:
        registry.catalogue.activate("a", 6, Actor("calm"))
        assert registry.catalogue.expert("a").state == "active"


def test_rows_go_when_they_are_older_than_the_settings_say(
    registry: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "_AT_ONCE", 1)
    for _ in range(3):
        fail(registry.catalogue, "a")
    registry.age(timedelta(days=20))
    younger = fail(registry.catalogue, "a")

    async def act(sleep: Sleep) -> None:
        registry.now.ahead = timedelta(days=9)
        await sleep.round()
        assert len(registry.catalogue.jobs()) == 4
        registry.now.ahead = timedelta(days=11)
        await sleep.round()
        assert [job.id for job in registry.catalogue.jobs()] == [younger]
        # Others had their turn between one transaction and the next one.
        assert len([seconds for seconds in sleep.asked if seconds < 1]) == 3
        lines = registry.catalogue.audit()
        assert [line.actor for line in lines if line.action == "prune"] == [Actor("system")] * 3
        registry.now.ahead = timedelta(days=346)
        await sleep.round()

    registry.run(act, jobs_days=30, audit_days=365)
    ages = [datetime.now(UTC) - line.at for line in registry.catalogue.audit()]
    assert max(ages) < timedelta(days=1)
    assert [job.id for job in registry.catalogue.jobs()] == [younger]


def test_rows_stay_for_ever_where_no_days_are_given(registry: Fixture) -> None:
    fail(registry.catalogue, "a")
    before = len(registry.catalogue.audit())

    async def act(sleep: Sleep) -> None:
        registry.now.ahead = timedelta(days=10_000)
        await sleep.round()

    registry.run(act, jobs_days=0, audit_days=0)
    assert (len(registry.catalogue.jobs()), len(registry.catalogue.audit())) == (1, before)


def test_trouble_is_told_once_and_waited_out(
    registry: Fixture, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    registry.old_blob("nobody's")
    whole = caretaker.collect_garbage
    pruned: list[object] = []

    def away(*_: object, **__: object) -> None:
        raise BlobError("the store is away")

    def gone(*_: object) -> None:
        pruned.append(None)
        raise CatalogueError("the catalogue is away")

    async def act(sleep: Sleep) -> None:
        monkeypatch.setattr(caretaker, "collect_garbage", away)
        monkeypatch.setattr(registry.catalogue, "prune", gone)
        for _ in range(3):
            await sleep.round()
        assert len(pruned) == 3
        assert [record.getMessage() for record in caplog.records] == [
            "garbage is not collected: the store is away",
            "old rows are not removed: the catalogue is away",
        ]
        monkeypatch.setattr(caretaker, "collect_garbage", whole)
        await sleep.round()
        assert list(registry.blobs.list()) == []
        monkeypatch.setattr(caretaker, "collect_garbage", away)
        await sleep.round()
        assert len(caplog.records) == 3

    with caplog.at_level(logging.WARNING, logger=caretaker.__name__):
        registry.run(act)


def test_a_collection_that_hangs_holds_up_neither_the_event_loop_nor_the_end(
    registry: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, release = threading.Event(), threading.Event()

    def hang(*_: object, **__: object) -> None:
        began.set()
        release.wait(60)
        raise CatalogueError("it is closed by now")

    monkeypatch.setattr(caretaker, "collect_garbage", hang)

    async def act(sleep: Sleep) -> None:
        waking = asyncio.create_task(sleep.round())
        await asyncio.to_thread(began.wait, 30)
        assert not waking.done()
        waking.cancel()
        await asyncio.gather(waking, return_exceptions=True)

    try:
        registry.run(act)
    finally:
        release.set()
