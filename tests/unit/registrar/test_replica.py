"""Live replicas and dead ones are told apart by beats and the watcher's own clock alone."""

import asyncio
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry

from experts.registry.catalogue import Catalogue
from experts.registry.records import Actor, Replica
from service.registrar.calls import Calls
from service.registrar.replica import Heartbeat
from service.registry_metrics import RegistryMetrics


class Clock:
    """Monotonic seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def calls() -> Iterator[Calls]:
    made = Calls(1)
    yield made
    made.close()


def heartbeat(name: str, catalogue: Catalogue, calls: Calls, clock: Clock, attempts: int = 3) -> Heartbeat:
    def describe(beat: int) -> Replica:
        return Replica(name, beat, catalogue.revision(), "build")

    sink = RegistryMetrics(CollectorRegistry())
    return Heartbeat(catalogue, name, describe, calls, sink, attempts=attempts, clock=clock)


def job_of(catalogue: Catalogue, owner: str) -> str:
    """A job that `owner` runs."""
    job = catalogue.submit("register", {"name": "new"}, Actor(), name="new", limit=8)
    claimed = catalogue.claim(owner)
    assert claimed is not None
    return job.id


def test_the_jobs_of_a_replica_whose_beat_stands_still_go_to_others(
    catalogue: Catalogue, calls: Calls
) -> None:
    clock = Clock()
    one, other = (heartbeat(name, catalogue, calls, clock) for name in ("one", "other"))
    asyncio.run(other.beat())
    job = job_of(catalogue, "other")
    asyncio.run(one.beat())
    clock.now += 4.9
    asyncio.run(one.beat())
    assert catalogue.job(job).owner == "other"
    clock.now += 0.2
    asyncio.run(one.beat())
    assert catalogue.job(job).state == "queued"
    assert [replica.id for replica in catalogue.replicas()] == ["one"]
    again = catalogue.claim("one")
    assert again is not None
    assert (again.id, again.attempt) == (job, 2)


def test_the_job_of_a_replica_that_was_killed_before_its_first_beat_goes_to_others(
    catalogue: Catalogue, calls: Calls
) -> None:
    clock = Clock()
    one = heartbeat("one", catalogue, calls, clock)
    job = job_of(catalogue, "never beat")
    asyncio.run(one.beat())
    clock.now += 4.9
    asyncio.run(one.beat())
    assert catalogue.job(job).owner == "never beat"
    clock.now += 0.2
    asyncio.run(one.beat())
    assert catalogue.job(job).state == "queued"


def test_a_replica_that_begins_to_beat_late_keeps_its_job(catalogue: Catalogue, calls: Calls) -> None:
    clock = Clock()
    one, late = (heartbeat(name, catalogue, calls, clock) for name in ("one", "late"))
    job = job_of(catalogue, "late")
    asyncio.run(one.beat())
    clock.now += 4.9
    asyncio.run(late.beat())
    asyncio.run(one.beat())
    clock.now += 0.2
    asyncio.run(one.beat())
    assert catalogue.job(job).owner == "late"


def test_a_replica_that_beats_lives_however_long_it_takes(catalogue: Catalogue, calls: Calls) -> None:
    clock = Clock()
    one, other = (heartbeat(name, catalogue, calls, clock) for name in ("one", "other"))
    asyncio.run(other.beat())
    job = job_of(catalogue, "other")
    for _ in range(5):
        asyncio.run(one.beat())
        clock.now += 4
        asyncio.run(other.beat())
    assert catalogue.job(job).owner == "other"
    assert len(catalogue.replicas()) == 2


def test_a_job_whose_replicas_keep_dying_fails_in_the_end(catalogue: Catalogue, calls: Calls) -> None:
    clock = Clock()
    one = heartbeat("one", catalogue, calls, clock, attempts=2)
    job = job_of(catalogue, "first")
    for name in ("first", "second"):
        asyncio.run(heartbeat(name, catalogue, calls, clock).beat())
        asyncio.run(one.beat())
        clock.now += 6
        asyncio.run(one.beat())
        catalogue.claim("second")
    ended = catalogue.job(job)
    assert ended.state == "failed"
    assert ended.failure is not None
    assert catalogue.generation("new", 1).state == "failed"


def test_one_that_leaves_gives_its_job_back_at_once_whatever_its_attempt(
    catalogue: Catalogue, calls: Calls
) -> None:
    clock = Clock()
    one = heartbeat("one", catalogue, calls, clock, attempts=1)
    asyncio.run(one.beat())
    job = job_of(catalogue, "one")
    asyncio.run(one.leave())
    assert catalogue.job(job).state == "queued"
    assert catalogue.replicas() == []


def test_leaving_uses_up_none_of_a_jobs_attempts(catalogue: Catalogue, calls: Calls) -> None:
    clock = Clock()
    watcher = heartbeat("watcher", catalogue, calls, clock, attempts=2)
    job = job_of(catalogue, "first")
    for name, later in (("first", "second"), ("second", "third")):
        asyncio.run(heartbeat(name, catalogue, calls, clock, attempts=2).leave())
        assert catalogue.job(job).state == "queued"
        assert catalogue.claim(later) is not None
    asyncio.run(watcher.beat())
    clock.now += 6
    asyncio.run(watcher.beat())
    again = catalogue.claim("fourth")
    assert again is not None
    assert (again.id, again.attempt) == (job, 4)
    asyncio.run(watcher.beat())
    clock.now += 6
    asyncio.run(watcher.beat())
    ended = catalogue.job(job)
    assert ended.state == "failed"
    assert ended.failure is not None
    assert "died, 2 times in all" in ended.failure.message
