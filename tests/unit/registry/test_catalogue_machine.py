"""Any changes in any order, by two servers in turn: the catalogue does what a few dictionaries do."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from itertools import count
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import insert

from experts.errors import ExpertsError
from experts.registry.catalogue import Catalogue
from experts.registry.catalogue.database import Database
from experts.registry.catalogue.tables import metadata, registry
from experts.registry.records import JobFailure, Progress, Replica, Trial
from tests.unit.registry.catalogue import ADMIN, BUILD, adopt, generation, router, submit
from tests.unit.registry.model import LIMIT, Model, ModelJob

ROUTED = st.sampled_from(["keep", "fitting", "any"])
NAMES = st.sampled_from(["a", "b", "c", "gone"])
ALIASES = st.sampled_from(["x", "a", "c", "family"])
OWNERS = st.sampled_from(["one", "two"])
NUMBERS = st.integers(1, 12)
EXPECTED = st.sampled_from(["none", "none", "right", "wrong"])
HOW = st.sampled_from(["live", "live", "live", "ready", "canary", "shadow"])
MEANWHILE = st.sampled_from(["nothing", "nothing", "activate", "pin", "disabled", "retired", "alias", "die"])
PICK = st.integers(0, 1000)


class Machine(RuleBasedStateMachine):
    """Does everything to the catalogue and to the model, and compares."""

    def __init__(self, wipe: Callable[[], None], catalogues: list[Catalogue]) -> None:
        super().__init__()
        self.model = Model()
        self.seen = 1
        self.acknowledged: set[tuple[str, int]] = set()
        self.handed_out: set[tuple[str, int]] = {("a", 3), ("b", 1)}
        self._beats = count(1)
        self._catalogues = catalogues
        wipe()

    @property
    def catalogue(self) -> Catalogue:
        """Two servers in turn."""
        self._catalogues.reverse()
        return self._catalogues[0]

    def both(self, asked: Callable[[Catalogue], Any], wanted: Callable[[], Any]) -> tuple[Any, Any] | None:
        """The results of both, or None where both refused."""
        refusal: type[ExpertsError] | None = None
        try:
            expected = wanted()
        except ExpertsError as error:
            refusal = type(error)
        if refusal is not None:
            with pytest.raises(refusal) as refused:
                asked(self.catalogue)
            assert refused.type is refusal, refused.value
            return None
        return asked(self.catalogue), expected

    def expected(self, name: str, how: str) -> int | None:
        expert = self.model.experts.get(name)
        live = expert.live if expert is not None and expert.live is not None else 1
        return {"none": None, "right": live, "wrong": live + 1}[how]

    def number(self, name: str, pick: int) -> int:
        """A ready one mostly, or another, or one that was never given out."""
        expert = self.model.experts.get(name)
        if expert is None:
            return 1 + pick % 2
        ready = [number for number, state in expert.generations.items() if state == "ready"]
        chosen = [*ready * 4, *expert.generations, expert.last + 1]
        return chosen[pick % len(chosen)]

    def job(self, pick: int) -> ModelJob:
        return self.model.jobs[-1 - pick % len(self.model.jobs)]

    def told(self, answer: tuple[Any, ModelJob] | None) -> None:
        """A job's id is the catalogue's to choose; its number must be new."""
        if answer is None:
            return
        made, wanted = answer
        wanted.id = made.id
        assert (made.name, made.generation) == (wanted.name, wanted.number)
        assert (made.name, made.generation) not in self.handed_out
        self.handed_out.add((made.name, made.generation))

    @initialize()
    def begin(self) -> None:
        adopt(self.catalogue)

    @rule(name=NAMES, replace=st.booleans(), how=EXPECTED)
    def submit(self, name: str, replace: bool, how: str) -> None:
        expected = self.expected(name, how)
        self.told(
            self.both(
                lambda c: submit(c, name, replace=replace, expected=expected, limit=LIMIT),
                lambda: self.model.submit(name, replace, expected),
            )
        )

    @rule(owner=OWNERS)
    def claim(self, owner: str) -> None:
        answer = self.both(lambda c: c.claim(owner), lambda: self.model.claim(owner))
        assert answer is not None
        made, wanted = answer
        assert (made and (made.id, made.attempt)) == (wanted and (wanted.id, wanted.attempt))

    @rule(
        name=NAMES,
        how=HOW,
        expecting=EXPECTED,
        profiled=st.booleans(),
        twist=st.sampled_from(["none", "none", "stale", "late", "twice", "stopped"]),
        before=MEANWHILE,
        between=MEANWHILE,
        pick=PICK,
    )
    def register(
        self,
        name: str,
        how: str,
        expecting: str,
        profiled: bool,
        twist: str,
        before: str,
        between: str,
        pick: int,
    ) -> None:
        """The whole way of one registration, with whatever others do before it and meanwhile."""
        self.meanwhile(name, before, pick)
        self.submit(name, True, expecting)
        self.claim("one")
        self.meanwhile(name, between, pick)
        running = self.model.running()
        if running is None:
            return
        if twist == "stopped":
            self.both(lambda c: c.cancel(running.id, ADMIN), lambda: self.model.cancel(running))
        for _ in range(2 if twist == "twice" else 1):
            self.publish(0, int(twist != "late"), profiled, int(twist != "stale"), how)

    def meanwhile(self, name: str, what: str, pick: int) -> None:
        match what:
            case "activate":
                self.activate(name, pick, "none", "fitting", 1)
            case "pin":
                self.pin(name, pick, "none")
            case "disabled" | "retired":
                self.set_state(name, what, "none")
            case "alias":
                self.set_alias("x", name)
            case "die":
                self.requeue("one", 1 + pick % 3)
                self.claim("two")

    @precondition(lambda self: self.model.jobs)
    @rule(
        pick=PICK,
        late=st.integers(0, 4),
        profiled=st.booleans(),
        stale=st.integers(0, 4),
        how=HOW,
    )
    def publish(self, pick: int, late: int, profiled: bool, stale: int, how: str) -> None:
        job = self.model.running() or self.job(pick)
        attempt = job.attempt - (late == 0)
        profiles = {**self.model.routers[self.model.router], job.name: job.number} if profiled else None
        fitted_on = self.model.router - (stale == 0)
        kind: Any = how
        trial = Trial(job.name, job.number, kind, 10.0) if how in ("canary", "shadow") else None
        before = self.model.router
        answer = self.both(
            lambda c: c.publish(
                job.id,
                attempt,
                generation(job.name, job.number),
                None if profiles is None else router(profiles),
                fitted_on,
                activate=how == "live",
                trial=trial,
                result={"was": before},
            ),
            lambda: self.model.publish(job, attempt, profiles, fitted_on, how == "live", trial),
        )
        if answer is not None:
            self.acknowledged.add((job.name, job.number))

    @precondition(lambda self: self.model.jobs)
    @rule(pick=PICK, late=st.booleans())
    def fail(self, pick: int, late: bool) -> None:
        job = self.model.running() or self.job(pick)
        attempt = job.attempt - late
        failure = JobFailure("expert_rejected", "no")
        self.both(lambda c: c.fail(job.id, attempt, failure), lambda: self.model.fail(job, attempt))

    @precondition(lambda self: self.model.jobs)
    @rule(pick=PICK)
    def cancel(self, pick: int) -> None:
        job = self.job(pick)
        self.both(lambda c: c.cancel(job.id, ADMIN), lambda: self.model.cancel(job))

    @precondition(lambda self: self.model.jobs)
    @rule(pick=PICK, late=st.booleans())
    def cancelled(self, pick: int, late: bool) -> None:
        job = self.model.running() or self.job(pick)
        attempt = job.attempt - late
        self.both(lambda c: c.cancelled(job.id, attempt), lambda: self.model.cancelled(job, attempt))

    @precondition(lambda self: self.model.jobs)
    @rule(pick=PICK)
    def retry(self, pick: int) -> None:
        job = self.job(pick)
        self.told(self.both(lambda c: c.retry(job.id, ADMIN), lambda: self.model.retry(job)))

    @rule(owner=OWNERS, attempts=st.none() | st.integers(1, 3))
    def requeue(self, owner: str, attempts: int | None) -> None:
        self.claim(owner)
        self.both(lambda c: c.requeue(owner, attempts), lambda: self.model.requeue(owner, attempts))

    @precondition(lambda self: self.model.running())
    @rule(percent=st.floats(0, 100))
    def progress(self, percent: float) -> None:
        job = self.model.running()
        assert job is not None
        assert self.catalogue.progress(job.id, job.attempt, Progress(percent)) is job.cancelling

    @rule(name=NAMES, pick=PICK, how=EXPECTED, routed=ROUTED, any_=NUMBERS)
    def activate(self, name: str, pick: int, how: str, routed: str, any_: int) -> None:
        number, expected = self.number(name, pick), self.expected(name, how)
        chosen = self.routed(name, number, routed, any_)
        self.both(
            lambda c: c.activate(name, number, ADMIN, expected=expected, router=chosen),
            lambda: self.model.activate(name, number, expected, chosen),
        )

    @rule(name=NAMES, pick=st.none() | PICK, how=EXPECTED, routed=ROUTED, any_=NUMBERS)
    def pin(self, name: str, pick: int | None, how: str, routed: str = "keep", any_: int = 0) -> None:
        number = None if pick is None else self.number(name, pick)
        expected = self.expected(name, how)
        chosen = None if number is None else self.routed(name, number, routed, any_)
        self.both(
            lambda c: c.pin(name, number, ADMIN, expected=expected, router=chosen),
            lambda: self.model.pin(name, number, expected, chosen),
        )

    def routed(self, name: str, number: int, how: str, any_: int) -> int | None:
        wanted = {**self.model.routers[self.model.router], name: number}
        fitting = [each for each, profiles in self.model.routers.items() if profiles == wanted]
        return {"keep": None, "fitting": fitting[-1] if fitting else None, "any": any_}[how]

    @rule(name=NAMES, state=st.sampled_from(["active", "disabled", "retired"]), how=EXPECTED)
    def set_state(self, name: str, state: Any, how: str) -> None:
        expected = self.expected(name, how)
        self.both(
            lambda c: c.set_state(name, state, ADMIN, expected=expected),
            lambda: self.model.set_state(name, state, expected),
        )

    @rule(name=NAMES, pick=st.none() | PICK, routed=st.none() | NUMBERS, how=EXPECTED)
    def try_out(self, name: str, pick: int | None, routed: int | None, how: str) -> None:
        trial = None if pick is None else Trial(name, self.number(name, pick), "shadow", 50.0, routed)
        expected = self.expected(name, how)
        self.both(
            lambda c: c.try_out(name, trial, ADMIN, expected=expected),
            lambda: self.model.try_out(name, trial, expected),
        )

    @rule(alias=ALIASES, name=NAMES)
    def set_alias(self, alias: str, name: str) -> None:
        self.both(lambda c: c.set_alias(alias, name, ADMIN), lambda: self.model.set_alias(alias, name))

    @rule(alias=ALIASES)
    def remove_alias(self, alias: str) -> None:
        self.both(lambda c: c.remove_alias(alias, ADMIN), lambda: self.model.remove_alias(alias))

    @rule(owner=OWNERS, name=NAMES, pick=PICK)
    def beat(self, owner: str, name: str, pick: int) -> None:
        lease = f"{name}@{self.number(name, pick)}"
        # Far ahead, so that nothing is kept for a replica that is behind.
        self.catalogue.beat(Replica(owner, next(self._beats), 2**40, BUILD, leases=(lease,)))
        self.model.leases[owner] = lease

    @rule(owner=OWNERS)
    def drop_replica(self, owner: str) -> None:
        self.catalogue.drop_replica(owner)
        self.model.leases.pop(owner, None)

    @rule(keep=st.integers(0, 2), retired_stay=st.booleans(), between=st.none() | st.tuples(NAMES, PICK))
    def collect(self, keep: int, retired_stay: bool, between: tuple[str, int] | None) -> None:
        before = datetime.min.replace(tzinfo=UTC) if retired_stay else None
        found = self.catalogue.collectable(keep, before)
        assert {(each.name, each.number) for each in found} == self.model.collectable(keep, retired_stay)
        if between is not None:
            # Somebody goes back to one of them before it is collected.
            self.activate(between[0], between[1], "none", "keep", 1)
        self.catalogue.collect(found, ADMIN, keep, before)
        self.model.collect({(each.name, each.number) for each in found}, keep, retired_stay)

    @rule()
    def prune(self) -> None:
        moment = datetime.now(UTC)
        # The clock counts for nothing unless something was written since.
        self.catalogue.record(ADMIN, "look", "registry", "refused")
        jobs, gone = len(self.model.jobs), self.model.prune()
        pruned = self.catalogue.prune(moment, None, ADMIN)
        assert (pruned.jobs, pruned.generations) == (jobs - len(self.model.jobs), len(gone))
        # Neither was lost that serves or could: only what was collected goes.
        self.acknowledged -= gone

    # -- what always holds ------------------------------------------------------------------------------

    @invariant()
    def every_change_advances_the_revision_and_nothing_else_differs(self) -> None:
        revision = self.catalogue.revision()
        assert revision == self.model.revision
        if revision == self.seen:
            return
        assert revision > self.seen
        self.seen = revision
        self.nothing_differs()
        self.the_snapshot_is_whole()

    def nothing_differs(self) -> None:
        catalogue, model = self.catalogue, self.model
        experts = {expert.name: expert for expert in catalogue.experts()}
        assert set(experts) == set(model.experts)
        for name, wanted in model.experts.items():
            found = experts[name]
            assert (found.state, found.generation, found.pinned, found.trial) == (
                wanted.state,
                wanted.live,
                wanted.pinned,
                wanted.trial,
            )
            states = {each.number: each.state for each in catalogue.generations(name)}
            assert states == wanted.generations
        jobs = [(job.id, job.state, job.attempt, job.cancelling) for job in reversed(catalogue.jobs())]
        assert jobs == [(job.id, job.state, job.attempt, job.cancelling) for job in model.jobs]
        assert sum(state == "running" for _, state, _, _ in jobs) <= 1
        routers = catalogue.routers()
        assert {each.number: dict(each.profiles) for each in routers} == model.routers
        assert {each.number for each in routers if not each.files} == model.given_up

    def the_snapshot_is_whole(self) -> None:
        shot = self.catalogue.snapshot()
        assert shot is not None
        assert shot.revision == self.model.revision
        serving = {
            name: each.live
            for name, each in self.model.experts.items()
            if each.state == "active" and each.live is not None
        }
        assert {name: each.number for name, each in shot.experts.items()} == serving
        assert all(each.state == "ready" and each.files for each in shot.experts.values())
        assert all(each.state == "ready" and each.files for each in shot.trial_generations)
        assert [(each.name, each.number) for each in shot.trial_generations] == [
            (each.name, each.generation) for each in shot.trials
        ]
        assert {each.router for each in shot.trials if each.router} == set(shot.trial_routers)
        assert shot.router is not None
        assert shot.router.number == self.model.router
        for each in (shot.router, *shot.trial_routers.values()):
            assert each.files
        assert shot.aliases == self.model.aliases
        assert all(self.model.experts[name].state != "retired" for name in shot.aliases.values())
        # What is needed is kept.
        served = [*shot.experts.values(), *shot.trial_generations, *shot.trial_routers.values()]
        served += [shot.router] if shot.router is not None else []
        assert {entry.sha256 for each in served for entry in each.files.values()} <= set(
            self.catalogue.referenced()
        )

    def teardown(self) -> None:
        """At the end: nothing acknowledged is lost, and every revision has its line in the audit log."""
        self.nothing_differs()
        for name, number in self.acknowledged:
            assert self.catalogue.generation(name, number).state in ("ready", "collected")
        entries = self.catalogue.audit(limit=10_000)
        assert {entry.revision for entry in entries} == set(range(1, self.catalogue.revision() + 1))


@pytest.fixture
def make(catalogue_url: str) -> Iterator[Callable[[], Machine]]:
    """Machines on an empty database each."""
    catalogues = [Catalogue.open(catalogue_url) for _ in range(2)]
    database = Database.open(catalogue_url)

    def wipe() -> None:
        with database.write() as connection:
            for table in reversed(metadata.sorted_tables):
                connection.execute(table.delete())
            connection.execute(insert(registry).values(id=1, revision=0))

    yield lambda: Machine(wipe, catalogues)
    for catalogue in catalogues:
        catalogue.close()
    database.close()


@pytest.mark.timeout(600)
def test_the_catalogue_does_what_its_model_does(make: Callable[[], Machine]) -> None:
    run_state_machine_as_test(
        make,
        settings=settings(
            max_examples=50,
            stateful_step_count=25,
            suppress_health_check=list(HealthCheck),
        ),
    )
