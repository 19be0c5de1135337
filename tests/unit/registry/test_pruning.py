"""What pruning removes, and all that it leaves as it was; on SQLite and PostgreSQL alike."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from experts.errors import RecordNotFoundError, TransitionError, UnknownExpertError
from experts.registry.blobs import Blobs
from experts.registry.catalogue import Catalogue, pruning
from experts.registry.records import Actor, BundleRecord, JobFailure, Pruned, Replica, Trial
from experts.registry.verify import collect_garbage
from tests.unit.registry.catalogue import (
    ADMIN,
    BUILD,
    adopt,
    generation,
    register,
    router,
    submit,
)
from tests.unit.registry.test_verify import Registry

NO = JobFailure("expert_rejected", "no")
TURN = 1000


def fail(catalogue: Catalogue, name: str, **options: object) -> str:
    """A registration that comes to nothing; its job."""
    submit(catalogue, name, **options)
    job = catalogue.claim("replica")
    assert job is not None
    return catalogue.fail(job.id, job.attempt, NO).id


def collect(catalogue: Catalogue, keep: int = 0) -> set[tuple[str, int]]:
    gone = catalogue.collect(catalogue.collectable(keep), ADMIN, keep)
    return {(each.name, each.number) for each in gone}


def passed(catalogue: Catalogue) -> datetime:
    """A moment after all that was done so far, and before a change that is made at once."""
    moment = datetime.now(UTC)
    catalogue.record(ADMIN, "look", "registry", "refused")
    return moment


def numbers(catalogue: Catalogue, name: str) -> dict[int, str]:
    return {each.number: each.state for each in catalogue.generations(name)}


def prune_all(catalogue: Catalogue, before: datetime) -> Pruned:
    """Until nothing more goes."""
    gone = Pruned()
    for _ in range(TURN):
        some = catalogue.prune(before, before, ADMIN)
        if not some.rows:
            return gone
        gone += some
    raise AssertionError("there is always something more to prune")


def standing(catalogue: Catalogue) -> list[Any]:
    """All that pruning has to leave as it is."""
    shot = catalogue.snapshot()
    assert shot is not None
    names = [expert.name for expert in catalogue.experts()]
    return [
        replace(shot, revision=0),
        catalogue.experts(),
        catalogue.aliases(),
        catalogue.bundles(),
        catalogue.referenced(),
        catalogue.pins(),
        catalogue.replicas(),
        catalogue.collectable(0),
        catalogue.collectable(2),
        [job for job in catalogue.jobs() if job.state in ("queued", "running")],
        [each for each in catalogue.routers() if each.files],
        {
            name: [it for it in catalogue.generations(name) if it.state in ("ready", "registering")]
            for name in names
        },
        {
            name: any(it.state in ("ready", "collected") for it in catalogue.generations(name))
            for name in names
        },
    ]


def test_old_jobs_that_ended_go_and_what_waits_or_runs_stays(catalogue: Catalogue) -> None:
    register(catalogue, "a")
    fail(catalogue, "b")
    catalogue.cancel(submit(catalogue, "c").id, ADMIN)
    running, waiting = submit(catalogue, "d"), submit(catalogue, "e")
    catalogue.claim("replica")
    gone = catalogue.prune(passed(catalogue), None, ADMIN)
    assert gone == Pruned(jobs=3, generations=2)
    assert {job.id for job in catalogue.jobs()} == {running.id, waiting.id}
    assert (numbers(catalogue, "d"), numbers(catalogue, "e")) == ({1: "registering"}, {1: "registering"})


def test_what_ended_after_the_limit_stays_with_its_generation(catalogue: Catalogue) -> None:
    submit(catalogue, "a")
    job = catalogue.claim("replica")
    assert job is not None
    moment = passed(catalogue)
    catalogue.fail(job.id, job.attempt, NO)
    assert catalogue.prune(moment, None, ADMIN) == Pruned()
    assert catalogue.job(job.id).state == "failed"
    assert numbers(catalogue, "a") == {3: "ready", 4: "failed"}
    assert catalogue.prune(passed(catalogue), None, ADMIN) == Pruned(jobs=1, generations=1)


def test_an_idempotency_key_goes_with_its_job(catalogue: Catalogue) -> None:
    before = fail(catalogue, "a", idempotency_key="once")
    assert submit(catalogue, "a", idempotency_key="once").id == before
    catalogue.prune(passed(catalogue), None, ADMIN)
    with pytest.raises(RecordNotFoundError):
        catalogue.job(before)
    again = submit(catalogue, "a", idempotency_key="once")
    assert (again.id != before, again.generation) == (True, 5)


def test_a_prune_is_one_change_with_one_line_and_none_where_nothing_goes(catalogue: Catalogue) -> None:
    assert catalogue.prune(passed(catalogue), None, ADMIN) == Pruned()
    fail(catalogue, "a")
    moment, revision = passed(catalogue), catalogue.revision()
    gone = catalogue.prune(moment, None, ADMIN)
    assert catalogue.revision() == revision + 1
    [line, *_] = catalogue.audit()
    assert (line.action, line.target, line.actor, line.revision) == (
        "prune",
        "registry",
        ADMIN,
        revision + 1,
    )
    assert line.detail == {"jobs": 1, "audit": 0, "generations": 1, "routers": 0}
    assert gone.rows == 2
    assert catalogue.prune(moment, None, ADMIN) == Pruned()
    assert catalogue.revision() == revision + 1


def test_without_limits_everything_stays(catalogue: Catalogue) -> None:
    fail(catalogue, "a")
    passed(catalogue)
    before = catalogue.revision(), catalogue.jobs(), catalogue.audit()
    assert catalogue.prune(None, None, ADMIN) == Pruned()
    assert (catalogue.revision(), catalogue.jobs(), catalogue.audit()) == before


def test_old_lines_of_the_audit_log_go_and_ids_never_repeat(catalogue: Catalogue) -> None:
    fail(catalogue, "a")
    moment = datetime.now(UTC)
    newest = catalogue.audit()[0].id
    catalogue.set_alias("x", "a", ADMIN)
    lines = len(catalogue.audit())
    assert catalogue.prune(None, moment, ADMIN) == Pruned(audit=lines - 1)
    left = catalogue.audit()
    assert [line.action for line in left] == ["prune", "alias"]
    assert min(line.id for line in left) > newest
    assert len(catalogue.jobs()) == 1


def test_lines_of_prunes_are_no_reason_to_prune(catalogue: Catalogue) -> None:
    fail(catalogue, "a")
    catalogue.prune(passed(catalogue), None, ADMIN)
    assert catalogue.prune(None, passed(catalogue), ADMIN).audit > 0
    assert [line.action for line in catalogue.audit()] == ["prune", "look"]
    # By and by the rest of that is old too.
    assert catalogue.prune(None, passed(catalogue), ADMIN).audit == 2
    revision = catalogue.revision()
    left = [line.action for line in catalogue.audit()]
    assert left == ["prune", "look"]
    moment = datetime.now(UTC)
    catalogue.prune(None, moment, ADMIN)
    assert catalogue.revision() == revision


def test_nothing_goes_by_a_clock_that_is_ahead_of_everything(catalogue: Catalogue) -> None:
    fail(catalogue, "a")
    before = standing(catalogue), catalogue.revision(), catalogue.jobs(), catalogue.audit()
    ahead = datetime.now(UTC) + timedelta(days=1)
    assert catalogue.prune(ahead, ahead, ADMIN) == Pruned()
    assert (standing(catalogue), catalogue.revision(), catalogue.jobs(), catalogue.audit()) == before


def test_collected_generations_go_but_for_what_tells_that_a_name_was_an_experts(catalogue: Catalogue) -> None:
    for _ in range(3):
        register(catalogue, "new")
    catalogue.set_state("new", "retired", ADMIN)
    fail(catalogue, "never")
    collect(catalogue)
    assert numbers(catalogue, "new") == {3: "collected", 2: "collected", 1: "collected"}
    catalogue.prune(passed(catalogue), None, ADMIN)
    assert numbers(catalogue, "new") == {3: "collected"}
    assert catalogue.expert("new").state == "retired"
    with pytest.raises(UnknownExpertError, match="it was retired"):
        catalogue.pin("new", None, ADMIN)
    with pytest.raises(TransitionError, match="collected"):
        catalogue.activate("new", 3, ADMIN)
    assert numbers(catalogue, "never") == {}
    with pytest.raises(UnknownExpertError):
        catalogue.activate("never", 1, ADMIN)
    assert submit(catalogue, "new").generation == 4
    assert submit(catalogue, "never").generation == 2


def test_a_retired_expert_that_nothing_serves_of_is_still_known(catalogue: Catalogue) -> None:
    """Its last generation came back ready and not live, so that only rows of generations tell of it."""
    register(catalogue, "new", profiled=False)
    catalogue.set_state("new", "retired", ADMIN)
    register(catalogue, "new", profiled=False, activate=False)
    assert catalogue.expert("new").generation is None
    catalogue.set_state("new", "retired", ADMIN)
    fail(catalogue, "new")
    collect(catalogue)
    catalogue.prune(passed(catalogue), None, ADMIN)
    assert numbers(catalogue, "new") == {2: "collected"}
    with pytest.raises(UnknownExpertError, match="it was retired"):
        catalogue.pin("new", None, ADMIN)


def test_a_generation_whose_profile_the_router_has_stays(catalogue: Catalogue) -> None:
    register(catalogue, "b", profiled=False)
    catalogue.set_state("b", "retired", ADMIN)
    assert collect(catalogue) == {("b", 1), ("b", 2)}
    shot = catalogue.snapshot()
    assert shot is not None
    assert shot.router is not None
    assert shot.router.profiles["b"] == 1
    assert catalogue.prune(passed(catalogue), None, ADMIN) == Pruned(jobs=1)
    assert numbers(catalogue, "b") == {2: "collected", 1: "collected"}


def test_what_a_trial_needs_stays(catalogue: Catalogue) -> None:
    register(catalogue, "a", trial=Trial("a", 4, "canary", 10.0))
    register(catalogue, "b")
    collect(catalogue)
    before = standing(catalogue)
    catalogue.prune(passed(catalogue), None, ADMIN)
    assert standing(catalogue) == before
    shot = catalogue.snapshot()
    assert shot is not None
    assert [each.number for each in shot.trial_generations] == [4]
    assert set(shot.trial_routers) == {3}


def test_a_generation_stays_while_a_job_of_its_expert_waits(catalogue: Catalogue) -> None:
    for _ in range(2):
        register(catalogue, "a")
    collect(catalogue, 1)
    assert numbers(catalogue, "a") == {5: "ready", 4: "collected", 3: "collected"}
    job = catalogue.submit("reprofile", {"name": "a", "generation": 4}, ADMIN, name="a", limit=9)
    assert catalogue.prune(passed(catalogue), None, ADMIN).generations == 0
    catalogue.cancel(job.id, ADMIN)
    assert catalogue.prune(passed(catalogue), None, ADMIN).generations == 2


def test_what_a_way_back_names_stays(catalogue: Catalogue) -> None:
    """A replica that still serves the bundle keeps it; its generations are given up all the same."""
    job = catalogue.submit("rebuild", {}, ADMIN, limit=9)
    catalogue.claim("replica")
    coming = [generation("a", 1, "build-2"), generation("b", 1, "build-2")]
    known = router({"a": 1, "b": 1}, "build-2")
    catalogue.switch_bundle(job.id, 1, BundleRecord("build-2", "family", "{}"), coming, known)
    catalogue.beat(Replica("behind", 1, 2**40, BUILD))
    assert collect(catalogue, 1) == {("a", 3), ("b", 1)}
    before = standing(catalogue)
    assert catalogue.prune(passed(catalogue), None, ADMIN) == Pruned(jobs=1)
    assert standing(catalogue) == before
    assert [each.number for each in catalogue.routers()] == [3, 2]
    with pytest.raises(TransitionError, match="collected"):
        catalogue.return_to(BUILD, ADMIN)


def test_routers_without_files_go_and_their_numbers_never_repeat(catalogue: Catalogue) -> None:
    register(catalogue, "a")
    register(catalogue, "a", activate=False)
    collect(catalogue)
    assert [(each.number, bool(each.files)) for each in catalogue.routers()] == [
        (4, False),
        (3, True),
        (2, False),
    ]
    assert catalogue.prune(passed(catalogue), None, ADMIN).routers == 1
    assert [each.number for each in catalogue.routers()] == [4, 3]
    register(catalogue, "a")
    assert catalogue.prune(passed(catalogue), None, ADMIN).routers == 1
    assert [each.number for each in catalogue.routers()] == [5, 3]


def test_so_much_goes_at_once_and_all_of_it_in_the_end(
    catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "_AT_ONCE", 2)
    for _ in range(5):
        fail(catalogue, "a")
    before, moment = standing(catalogue), passed(catalogue)
    first = catalogue.prune(moment, moment, ADMIN)
    assert first == Pruned(jobs=2, audit=2, generations=2)
    rest = prune_all(catalogue, moment)
    assert (rest.jobs, rest.generations) == (3, 3)
    assert catalogue.jobs() == []
    assert numbers(catalogue, "a") == {3: "ready"}
    assert all(line.at >= moment for line in catalogue.audit())
    assert standing(catalogue) == before
    assert submit(catalogue, "a").generation == 9


def lived_through(catalogue: Catalogue) -> None:
    """A long life in short: trials, pins, failures, names that came and went."""
    for name in ("a", "b", "c", "a", "b"):
        register(catalogue, name)
        fail(catalogue, name)
    register(catalogue, "a", trial=Trial("a", 7, "shadow", 5.0))
    catalogue.pin("b", 2, ADMIN)
    catalogue.set_alias("see", "c", ADMIN)
    register(catalogue, "d")
    catalogue.set_state("d", "retired", ADMIN)
    register(catalogue, "e", profiled=False)
    catalogue.set_state("e", "disabled", ADMIN)
    fail(catalogue, "never")
    catalogue.beat(Replica("one", 1, catalogue.revision(), BUILD, leases=("a@3",)))
    collect(catalogue, 1)
    submit(catalogue, "c")
    catalogue.claim("replica")
    submit(catalogue, "d")


def test_a_long_life_is_served_as_before_and_goes_on_as_before(catalogue: Catalogue) -> None:
    lived_through(catalogue)
    before, revision = standing(catalogue), catalogue.revision()
    gone = prune_all(catalogue, passed(catalogue))
    assert gone.jobs > 0
    assert gone.audit > 0
    assert gone.generations > 0
    assert standing(catalogue) == before
    assert catalogue.revision() == revision + 1
    # Everything can still be done, and under new numbers.
    catalogue.cancel(catalogue.jobs(state="running")[0].id, ADMIN)
    catalogue.requeue("replica", 3)
    collect(catalogue, 1)
    prune_all(catalogue, passed(catalogue))
    assert catalogue.snapshot() is not None


def test_the_checker_finds_nothing_after_a_prune(catalogue_url: str, tmp_path: Path) -> None:
    blobs = Blobs.open(str(tmp_path / "blobs"), tmp_path / "cache")
    registry = Registry(catalogue_url, tmp_path, blobs)
    catalogue = registry.catalogue
    for name in ("alpha", "gamma", "alpha", "gamma", "beta"):
        registry.register(name)
        fail(catalogue, name)
    for name in ("gamma", "beta"):
        catalogue.set_state(name, "retired", ADMIN)
    collect_garbage(catalogue, blobs, 1, ADMIN)
    assert registry.verify().found == ()
    before = catalogue.referenced()
    gone = prune_all(catalogue, passed(catalogue))
    assert gone.generations > 0
    assert catalogue.referenced() == before
    assert registry.verify(repair=True).found == ()
    assert collect_garbage(catalogue, blobs, 1, ADMIN).blobs == 0
    catalogue.close()


@pytest.fixture
def pair(catalogue_url: str) -> Iterator[list[Catalogue]]:
    """One database, opened by two servers."""
    opened = [Catalogue.open(catalogue_url) for _ in range(2)]
    adopt(opened[0])
    yield opened
    for catalogue in opened:
        catalogue.close()


def test_registrations_go_on_while_others_prune(pair: list[Catalogue]) -> None:
    rounds, start = 6, threading.Barrier(4)

    def register_some(index: int) -> list[tuple[str, int]]:
        start.wait(30)
        made = []
        for turn in range(rounds):
            job = submit(pair[index], f"n{index}", Actor(f"admin {index}"), idempotency_key=f"{turn}")
            assert job.generation is not None
            made.append((f"n{index}", job.generation))
            pair[index].cancel(job.id, ADMIN)
        return made

    def prune_some(index: int) -> Pruned:
        start.wait(30)
        gone = Pruned()
        for _ in range(rounds):
            gone += pair[index].prune(passed(pair[index]), None, ADMIN)
        return gone

    with ThreadPoolExecutor(4) as threads:
        registering = [threads.submit(register_some, index) for index in range(2)]
        pruned = [threads.submit(prune_some, index) for index in range(2)]
        made = [each for one in registering for each in one.result()]
        gone = sum((one.result() for one in pruned), Pruned())
    assert sorted(made) == [(f"n{index}", number) for index in range(2) for number in range(1, rounds + 1)]
    gone += pair[0].prune(passed(pair[0]), None, ADMIN)
    assert (gone.jobs, gone.generations) == (2 * rounds, 2 * rounds)
    assert pair[1].jobs() == []
    lines = pair[1].audit(limit=TURN)
    assert {line.revision for line in lines} == set(range(1, pair[0].revision() + 1))
    assert submit(pair[1], "n0").generation == rounds + 1
