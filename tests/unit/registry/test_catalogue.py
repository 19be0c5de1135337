"""What the catalogue promises, on SQLite and PostgreSQL alike."""

import math
import threading
from datetime import UTC, datetime

import pytest

from experts.errors import (
    BundleError,
    DuplicateExpertError,
    GenerationConflictError,
    IdempotencyError,
    JobLostError,
    RecordNotFoundError,
    RegistryFullError,
    StaleRouterError,
    TransitionError,
    UnknownExpertError,
)
from experts.registry.catalogue import Absent, Catalogue, collecting
from experts.registry.records import (
    Actor,
    BundleRecord,
    JobFailure,
    Progress,
    Replica,
    Snapshot,
    Trial,
)
from tests.unit.registry.catalogue import (
    ADMIN,
    BUILD,
    adopt,
    digest,
    finish,
    generation,
    publish,
    register,
    router,
    submit,
)

REFUSED = JobFailure("expert_rejected", "it is no fine-tune of this base", "path")


def served(catalogue: Catalogue) -> Snapshot:
    shot = catalogue.snapshot()
    assert shot is not None
    return shot


def live(catalogue: Catalogue) -> dict[str, int]:
    return {name: each.number for name, each in served(catalogue).experts.items()}


def test_an_empty_catalogue_serves_nothing_and_takes_no_registration(catalogue_url: str) -> None:
    catalogue = Catalogue.open(catalogue_url)
    assert (catalogue.revision(), catalogue.snapshot(), catalogue.experts()) == (0, None, [])
    with pytest.raises(TransitionError, match="no bundle"):
        submit(catalogue, "new")
    catalogue.close()


def test_a_bundle_is_adopted_once_with_its_numbers(catalogue: Catalogue) -> None:
    shot = served(catalogue)
    assert live(catalogue) == {"a": 3, "b": 1}
    assert shot.router is not None
    assert (shot.router.number, dict(shot.router.profiles)) == (2, {"a": 3, "b": 1})
    adopt(catalogue)
    assert catalogue.revision() == shot.revision == 1
    with pytest.raises(TransitionError, match="catalogue of its own"):
        catalogue.adopt(BundleRecord("other", "family", "{}"), [], None)


def test_numbers_of_experts_that_the_bundle_retired_are_not_used_again(catalogue: Catalogue) -> None:
    assert submit(catalogue, "gone").generation == 8


def test_a_registration_goes_live_with_its_router_at_once(catalogue: Catalogue) -> None:
    job = submit(catalogue, "new")
    assert (job.state, job.generation) == ("queued", 1)
    assert catalogue.generation("new", 1).state == "registering"
    assert "new" not in live(catalogue)
    done = finish(catalogue, result={"bytes": 9})
    shot = served(catalogue)
    assert (done.state, done.progress.percent, done.result) == ("succeeded", 100.0, {"bytes": 9})
    assert live(catalogue) == {"a": 3, "b": 1, "new": 1}
    assert shot.router is not None
    assert dict(shot.router.profiles) == {"a": 3, "b": 1, "new": 1}
    assert shot.router.number == 3
    assert shot.experts["new"].job == job.id


def test_a_failed_registration_serves_nothing_and_its_number_is_gone(catalogue: Catalogue) -> None:
    submit(catalogue, "a")
    job = catalogue.claim("replica")
    assert job is not None
    failed = catalogue.fail(job.id, job.attempt, REFUSED, {"checks": {"finite": False, "norm": math.nan}})
    assert (failed.state, failed.failure) == ("failed", REFUSED)
    found = catalogue.generation("a", 4)
    assert (found.state, found.files, found.report["checks"]["norm"]) == ("failed", {}, "nan")
    assert live(catalogue) == {"a": 3, "b": 1}
    with pytest.raises(TransitionError, match="failed"):
        catalogue.activate("a", 4, ADMIN)
    assert submit(catalogue, "a").generation == 5


def test_a_name_whose_first_registration_failed_is_free(catalogue: Catalogue) -> None:
    submit(catalogue, "new", replace=False)
    job = catalogue.claim("replica")
    assert job is not None
    catalogue.fail(job.id, job.attempt, REFUSED)
    with pytest.raises(UnknownExpertError):
        catalogue.set_state("new", "disabled", ADMIN)
    assert submit(catalogue, "new", replace=False).generation == 2


def test_a_name_in_use_is_taken_unless_the_generation_to_replace_is_named(catalogue: Catalogue) -> None:
    with pytest.raises(DuplicateExpertError):
        submit(catalogue, "a", replace=False)
    with pytest.raises(GenerationConflictError, match="at generation 3, not 2"):
        submit(catalogue, "a", expected=2)
    with pytest.raises(UnknownExpertError):
        submit(catalogue, "new", expected=1)
    with pytest.raises(GenerationConflictError):
        submit(catalogue, "new", expected=1, precondition=True)
    assert submit(catalogue, "a", replace=False, expected=3).generation == 4


@pytest.mark.parametrize(
    "name", ["../a", "a/b", "", "shared", "a\0b", "ünïcode", "x" * 65, ".a", "\ud800", "-a", "a\n", "a b"]
)
def test_names_that_are_no_names_are_refused(catalogue: Catalogue, name: str) -> None:
    with pytest.raises(BundleError, match=r"not allowed|reserved"):
        submit(catalogue, name)
    with pytest.raises(BundleError):
        catalogue.set_alias(name, "a", ADMIN)
    with pytest.raises(UnknownExpertError):
        catalogue.activate(name, 1, ADMIN)
    with pytest.raises(UnknownExpertError):
        catalogue.expert(name)
    with pytest.raises(RecordNotFoundError):
        catalogue.generation(name, 1)
    with pytest.raises(RecordNotFoundError):
        catalogue.job(name)
    with pytest.raises(RecordNotFoundError):
        catalogue.remove_alias(name, ADMIN)
    assert catalogue.generations(name) == catalogue.jobs(name=name) == catalogue.audit(target=name) == []
    assert catalogue.revision() == 1


@pytest.mark.parametrize("number", [0, -1, 4, 2**31, 2**63, 10**30])
def test_generations_that_were_never_made_are_not_found(catalogue: Catalogue, number: int) -> None:
    with pytest.raises(RecordNotFoundError):
        catalogue.activate("a", number, ADMIN)
    with pytest.raises(RecordNotFoundError):
        catalogue.generation("a", number)
    with pytest.raises(RecordNotFoundError):
        catalogue.router(number)
    with pytest.raises(GenerationConflictError):
        catalogue.activate("a", 3, ADMIN, expected=number)


def test_text_that_no_database_holds_is_kept_where_it_is_somebody_elses(catalogue: Catalogue) -> None:
    odd = "layer\0\ud800.weight"
    job = catalogue.submit("register", {"path": odd}, Actor(odd, odd), name="new", limit=9)
    assert catalogue.job(job.id).request == {"path": odd}
    claimed = catalogue.claim("replica")
    assert claimed is not None
    catalogue.progress(job.id, 1, Progress(3.0, "check", odd, math.inf))
    assert catalogue.job(job.id).progress == Progress(3.0, "check", odd, None)
    catalogue.fail(job.id, 1, JobFailure("expert_rejected", odd), {odd: odd})
    assert catalogue.generation("new", 1).report == {odd: odd}
    with pytest.raises(IdempotencyError):
        submit(catalogue, "other", idempotency_key=odd)


def test_one_job_runs_at_a_time_in_the_order_they_came(catalogue: Catalogue) -> None:
    first, second = submit(catalogue, "one"), submit(catalogue, "two")
    assert catalogue.claim("replica").id == first.id  # type: ignore[union-attr]
    assert catalogue.claim("other") is None
    catalogue.fail(first.id, 1, REFUSED)
    assert catalogue.claim("other").id == second.id  # type: ignore[union-attr]


def test_progress_never_falls_and_tells_of_a_wish_to_stop(catalogue: Catalogue) -> None:
    job = submit(catalogue, "new")
    catalogue.claim("replica")
    before = catalogue.revision()
    assert catalogue.progress(job.id, 1, Progress(40.0, "compress", "w", 3.5)) is False
    assert catalogue.progress(job.id, 1, Progress(10.0, "store")) is False
    assert catalogue.job(job.id).progress == Progress(40.0, "store", "", None)
    assert catalogue.revision() == before
    assert catalogue.cancel(job.id, ADMIN).cancelling
    assert catalogue.progress(job.id, 1, Progress(50.0)) is True
    assert catalogue.cancelled(job.id, 1).state == "cancelled"
    with pytest.raises(JobLostError):
        catalogue.progress(job.id, 1, Progress(60.0))
    assert catalogue.generation("new", 1).state == "failed"


def test_a_waiting_job_is_cancelled_at_once(catalogue: Catalogue) -> None:
    job = submit(catalogue, "new")
    assert catalogue.cancel(job.id, ADMIN).state == "cancelled"
    assert catalogue.claim("replica") is None
    with pytest.raises(TransitionError, match="cancelled"):
        catalogue.cancel(job.id, ADMIN)


def test_a_job_that_was_told_to_stop_never_publishes(catalogue: Catalogue) -> None:
    job = submit(catalogue, "a")
    claimed = catalogue.claim("replica")
    assert claimed is not None
    catalogue.cancel(job.id, ADMIN)
    with pytest.raises(JobLostError):
        publish(catalogue, claimed)
    assert catalogue.job(job.id).state == "cancelled"
    assert live(catalogue)["a"] == 3
    assert catalogue.claim("replica") is None


def test_what_an_attempt_reports_after_another_began_counts_for_nothing(catalogue: Catalogue) -> None:
    submit(catalogue, "a")
    lost = catalogue.claim("dead")
    assert lost is not None
    assert [job.state for job in catalogue.requeue("dead", 3)] == ["queued"]
    again = catalogue.claim("replica")
    assert again is not None
    assert (again.id, again.attempt) == (lost.id, 2)
    with pytest.raises(JobLostError):
        publish(catalogue, lost)
    with pytest.raises(JobLostError):
        catalogue.fail(lost.id, lost.attempt, REFUSED)
    with pytest.raises(JobLostError):
        catalogue.cancelled(lost.id, lost.attempt)
    assert publish(catalogue, again).state == "succeeded"
    assert live(catalogue)["a"] == 4


def test_a_job_that_kills_its_servers_fails_in_the_end(catalogue: Catalogue) -> None:
    submit(catalogue, "a")
    for attempt in (1, 2):
        assert catalogue.claim("dead").attempt == attempt  # type: ignore[union-attr]
        (job,) = catalogue.requeue("dead", 2)
    assert job.state == "failed"
    assert catalogue.requeue("dead", 2) == []


def test_a_job_that_was_to_stop_when_its_server_died_is_cancelled(catalogue: Catalogue) -> None:
    job = submit(catalogue, "a")
    catalogue.claim("dead")
    catalogue.cancel(job.id, ADMIN)
    assert [job.state for job in catalogue.requeue("dead", 3)] == ["cancelled"]


def test_a_job_is_published_once_however_often_it_is_told(catalogue: Catalogue) -> None:
    submit(catalogue, "a")
    job = catalogue.claim("replica")
    assert job is not None
    first = publish(catalogue, job)
    revision = catalogue.revision()
    assert publish(catalogue, job) == first
    assert catalogue.revision() == revision
    with pytest.raises(JobLostError):
        catalogue.fail(job.id, job.attempt, REFUSED)


def test_a_router_fitted_on_an_older_one_is_refused_with_its_expert(catalogue: Catalogue) -> None:
    submit(catalogue, "new")
    job = catalogue.claim("replica")
    assert job is not None
    made = router({"a": 3, "b": 1, "new": 1})
    with pytest.raises(StaleRouterError):
        catalogue.publish(job.id, 1, generation("new", 1), made, 1)
    assert "new" not in live(catalogue)
    assert catalogue.generation("new", 1).state == "registering"
    assert catalogue.publish(job.id, 1, generation("new", 1), made, 2).state == "succeeded"


def test_a_generation_for_another_bundle_is_refused(catalogue: Catalogue) -> None:
    submit(catalogue, "new")
    job = catalogue.claim("replica")
    assert job is not None
    with pytest.raises(TransitionError, match="bundle other"):
        catalogue.publish(job.id, 1, generation("new", 1, "other"), None, None)
    with pytest.raises(TransitionError, match="makes new@1"):
        catalogue.publish(job.id, 1, generation("new", 2), None, None)


def test_rollback_takes_the_router_back_too(catalogue: Catalogue) -> None:
    register(catalogue, "a")
    expert = catalogue.activate("a", 3, ADMIN, expected=4, router=2)
    assert expert.generation == 3
    assert live(catalogue)["a"] == 3
    assert served(catalogue).router.number == 2  # type: ignore[union-attr]
    catalogue.activate("a", 4, ADMIN)
    assert served(catalogue).router.number == 2  # type: ignore[union-attr]


def test_a_rollback_does_not_take_back_what_the_router_learned_since(catalogue: Catalogue) -> None:
    register(catalogue, "a")
    register(catalogue, "new")
    with pytest.raises(StaleRouterError):
        catalogue.activate("a", 3, ADMIN, router=2)
    assert live(catalogue)["a"] == 4


def test_a_router_can_be_made_for_what_serves_and_not_for_what_does_not(catalogue: Catalogue) -> None:
    register(catalogue, "a")
    catalogue.activate("a", 3, ADMIN)
    job = catalogue.submit("reprofile", {"name": "a"}, ADMIN, name="a", limit=9)
    assert job.generation is None
    catalogue.claim("replica")
    with pytest.raises(StaleRouterError, match="a@2"):
        catalogue.publish(job.id, 1, None, router({"a": 2, "b": 1}), 3)
    catalogue.publish(job.id, 1, None, router({"a": 3, "b": 1}), 3)
    assert dict(served(catalogue).router.profiles) == {"a": 3, "b": 1}  # type: ignore[union-attr]


def test_a_pinned_expert_keeps_its_generation_and_the_router(catalogue: Catalogue) -> None:
    assert catalogue.pin("a", 3, ADMIN).pinned
    register(catalogue, "a")
    assert catalogue.generation("a", 4).state == "ready"
    assert live(catalogue)["a"] == 3
    assert served(catalogue).router.number == 2  # type: ignore[union-attr]
    assert not catalogue.pin("a", None, ADMIN).pinned
    register(catalogue, "a")
    assert live(catalogue)["a"] == 5


def test_pinning_another_generation_switches_to_it(catalogue: Catalogue) -> None:
    register(catalogue, "a")
    assert catalogue.pin("a", 3, ADMIN, expected=4).generation == 3
    with pytest.raises(GenerationConflictError):
        catalogue.pin("a", 4, ADMIN, expected=4)


def test_a_disabled_expert_comes_back_as_it_was(catalogue: Catalogue) -> None:
    catalogue.set_state("a", "disabled", ADMIN, expected=3)
    assert live(catalogue) == {"b": 1}
    with pytest.raises(DuplicateExpertError):
        submit(catalogue, "a", replace=False)
    register(catalogue, "a")
    assert live(catalogue) == {"b": 1}
    catalogue.set_state("a", "active", ADMIN)
    assert live(catalogue) == {"a": 4, "b": 1}


def test_a_retired_experts_name_is_free_and_its_numbers_are_not(catalogue: Catalogue) -> None:
    catalogue.set_alias("old", "a", ADMIN)
    catalogue.set_state("a", "retired", ADMIN)
    assert live(catalogue) == {"b": 1}
    assert served(catalogue).aliases == {}
    with pytest.raises(UnknownExpertError, match="retired"):
        catalogue.set_state("a", "active", ADMIN)
    with pytest.raises(UnknownExpertError):
        catalogue.set_alias("old", "a", ADMIN)
    assert submit(catalogue, "a", replace=False).generation == 4
    finish(catalogue)
    assert live(catalogue) == {"a": 4, "b": 1}


def test_a_mistaken_retirement_is_taken_back_by_activating(catalogue: Catalogue) -> None:
    catalogue.set_state("a", "retired", ADMIN)
    assert catalogue.activate("a", 3, ADMIN).state == "active"
    assert live(catalogue) == {"a": 3, "b": 1}


def test_what_was_retired_stays_so_when_a_new_generation_is_only_made_ready(catalogue: Catalogue) -> None:
    catalogue.set_state("a", "retired", ADMIN)
    register(catalogue, "a", activate=False)
    assert live(catalogue) == {"b": 1}
    assert catalogue.activate("a", 4, ADMIN).generation == 4


def test_retiring_an_expert_ends_its_registration(catalogue: Catalogue) -> None:
    submit(catalogue, "a")
    running = catalogue.claim("replica")
    assert running is not None
    catalogue.set_state("a", "retired", ADMIN)
    with pytest.raises(JobLostError):
        publish(catalogue, running)
    assert live(catalogue) == {"b": 1}


def test_a_registration_that_expected_a_generation_conflicts_when_it_would_go_live(
    catalogue: Catalogue,
) -> None:
    register(catalogue, "a")
    submit(catalogue, "a", expected=4)
    job = catalogue.claim("replica")
    assert job is not None
    catalogue.activate("a", 3, ADMIN)
    with pytest.raises(GenerationConflictError):
        publish(catalogue, job)
    assert live(catalogue)["a"] == 3
    assert catalogue.generation("a", 5).state == "registering"


def test_a_canary_is_in_the_snapshot_beside_what_serves(catalogue: Catalogue) -> None:
    register(catalogue, "a", trial=Trial("a", 4, "canary", 10.0))
    shot = served(catalogue)
    assert live(catalogue)["a"] == 3
    assert shot.router is not None
    assert shot.router.number == 2
    assert shot.trials == (Trial("a", 4, "canary", 10.0, 3),)
    assert [each.number for each in shot.trial_generations] == [4]
    assert dict(shot.trial_routers[3].profiles) == {"a": 4, "b": 1}
    catalogue.activate("a", 4, ADMIN, router=3)
    shot = served(catalogue)
    assert (shot.trials, live(catalogue)["a"], shot.router.number) == ((), 4, 3)  # type: ignore[union-attr]


@pytest.mark.parametrize("percent", [0.0, -1.0, 100.5, math.nan, math.inf])
def test_a_trial_takes_a_share_of_requests(catalogue: Catalogue, percent: float) -> None:
    register(catalogue, "a", activate=False)
    with pytest.raises(TransitionError, match="percent"):
        catalogue.try_out("a", Trial("a", 4, "shadow", percent), ADMIN)


def test_only_what_is_ready_and_does_not_serve_is_tried_out(catalogue: Catalogue) -> None:
    with pytest.raises(TransitionError, match="serves already"):
        catalogue.try_out("a", Trial("a", 3, "shadow", 5.0), ADMIN)
    with pytest.raises(RecordNotFoundError):
        catalogue.try_out("a", Trial("a", 4, "shadow", 5.0), ADMIN)
    submit(catalogue, "a")
    with pytest.raises(TransitionError, match="registering"):
        catalogue.try_out("a", Trial("a", 4, "shadow", 5.0), ADMIN)
    finish(catalogue, activate=False)
    with pytest.raises(RecordNotFoundError):
        catalogue.try_out("a", Trial("a", 4, "shadow", 5.0, 99), ADMIN)
    assert catalogue.try_out("a", Trial("a", 4, "shadow", 5.0), ADMIN, expected=3).trial is not None
    assert catalogue.try_out("a", None, ADMIN).trial is None


def test_an_alias_stands_for_one_expert_and_is_no_experts_name(catalogue: Catalogue) -> None:
    catalogue.set_alias("best", "a", ADMIN)
    catalogue.set_alias("best", "b", ADMIN)
    assert served(catalogue).aliases == catalogue.aliases() == {"best": "b"}
    for taken in ("a", "family"):
        with pytest.raises(DuplicateExpertError):
            catalogue.set_alias(taken, "b", ADMIN)
        with pytest.raises(DuplicateExpertError):
            submit(catalogue, taken if taken != "a" else "best")
    catalogue.remove_alias("best", ADMIN)
    with pytest.raises(RecordNotFoundError):
        catalogue.remove_alias("best", ADMIN)


def test_a_name_that_is_being_registered_is_no_alias_and_one_that_failed_may_be(catalogue: Catalogue) -> None:
    submit(catalogue, "new")
    job = catalogue.claim("replica")
    assert job is not None
    with pytest.raises(DuplicateExpertError):
        catalogue.set_alias("new", "a", ADMIN)
    catalogue.fail(job.id, 1, REFUSED)
    catalogue.set_alias("new", "a", ADMIN)
    with pytest.raises(DuplicateExpertError, match="alias"):
        catalogue.retry(job.id, ADMIN)


def test_the_same_key_gives_the_same_job_to_the_same_actor_only(catalogue: Catalogue) -> None:
    first = submit(catalogue, "new", idempotency_key="k")
    revision = catalogue.revision()
    assert submit(catalogue, "new", idempotency_key="k") == first
    assert catalogue.revision() == revision
    with pytest.raises(IdempotencyError):
        submit(catalogue, "other", idempotency_key="k")
    other = submit(catalogue, "other", Actor("someone else"), idempotency_key="k")
    assert other.id != first.id
    finish(catalogue)
    assert submit(catalogue, "new", idempotency_key="k").state == "succeeded"


def test_so_many_jobs_wait_and_no_more(catalogue: Catalogue) -> None:
    submit(catalogue, "one", limit=2)
    submit(catalogue, "two", limit=2)
    with pytest.raises(RegistryFullError):
        submit(catalogue, "three", limit=2)
    assert {expert.name for expert in catalogue.experts()} == {"a", "b", "gone", "one", "two"}


def test_one_registration_of_an_expert_at_a_time(catalogue: Catalogue) -> None:
    job = submit(catalogue, "new")
    with pytest.raises(TransitionError, match=job.id):
        submit(catalogue, "new")


def test_a_failed_job_is_tried_again_with_a_new_number(catalogue: Catalogue) -> None:
    job = submit(catalogue, "new")
    with pytest.raises(TransitionError, match="queued"):
        catalogue.retry(job.id, ADMIN)
    catalogue.claim("replica")
    catalogue.fail(job.id, 1, REFUSED)
    again = catalogue.retry(job.id, ADMIN)
    assert (again.id != job.id, again.generation, again.request) == (True, 2, job.request)
    with pytest.raises(TransitionError, match="being registered"):
        catalogue.retry(job.id, ADMIN)
    assert finish(catalogue).generation == 2
    assert live(catalogue)["new"] == 2


def test_jobs_are_listed_the_newest_first_page_by_page(catalogue: Catalogue) -> None:
    made = [submit(catalogue, f"n{index}").id for index in range(5)]
    first = catalogue.jobs(limit=2)
    assert [job.id for job in first] == made[:2:-1]
    assert [job.id for job in catalogue.jobs(limit=9, after=first[-1].id)] == made[2::-1]
    assert [job.id for job in catalogue.jobs(name="n3")] == [made[3]]
    assert catalogue.jobs(state="running") == []


def test_a_refused_change_of_a_monstrous_name_is_in_the_audit_log_too(catalogue: Catalogue) -> None:
    # Random text: what a database can compress it might index all the same.
    name = "".join(digest(str(number)) for number in range(200))
    catalogue.record(ADMIN, "retire", name, "refused: UnknownExpertError")
    assert name.startswith(catalogue.audit(limit=1)[0].target)
    assert len(catalogue.audit(limit=1)[0].target) >= 64


def test_every_change_is_in_the_audit_log_with_who_asked(catalogue: Catalogue) -> None:
    submit(catalogue, "a")
    finish(catalogue)
    catalogue.activate("a", 3, ADMIN)
    catalogue.record(Actor("mallory", "198.51.100.7"), "retire", "a", "refused: forbidden", {"why": "key"})
    entries = catalogue.audit(target="a")
    assert [entry.action for entry in entries] == [
        "retire",
        "activate",
        "register.succeeded",
        "publish",
        "claim",
        "register",
    ]
    assert (entries[0].actor.address, entries[0].result) == ("198.51.100.7", "refused: forbidden")
    assert entries[0].revision == entries[1].revision == catalogue.revision()
    assert (entries[1].actor, entries[1].detail) == (ADMIN, {"from": 4, "to": 3})
    assert [entry.action for entry in catalogue.audit(limit=1, before=entries[0].id)] == ["activate"]


def test_the_generations_that_something_needs_are_not_collected(catalogue: Catalogue) -> None:
    for _ in range(4):
        register(catalogue, "a")
    found = [each.number for each in catalogue.collectable(2)]
    assert found == [5, 4, 3]
    catalogue.beat(Replica("r", 1, catalogue.revision(), BUILD, leases=("a@4",)))
    assert [each.number for each in catalogue.collectable(2)] == [5, 3]
    catalogue.beat(Replica("r", 2, 1, BUILD))
    assert catalogue.collectable(2) == []
    catalogue.drop_replica("r")
    register(catalogue, "a", trial=Trial("a", 8, "canary", 1.0))
    assert [each.number for each in catalogue.collectable(0)] == [6, 5, 4, 3]


def test_a_generation_whose_profile_the_router_has_is_kept(catalogue: Catalogue) -> None:
    register(catalogue, "a")
    catalogue.activate("a", 3, ADMIN)
    assert catalogue.collectable(0) == []
    catalogue.activate("a", 3, ADMIN, router=2)
    assert [each.number for each in catalogue.collectable(0)] == [4]


def test_what_came_into_use_again_is_not_collected(catalogue: Catalogue) -> None:
    register(catalogue, "a")
    found = catalogue.collectable(0)
    assert [each.number for each in found] == [3]
    catalogue.activate("a", 3, ADMIN)
    assert catalogue.collect(found, ADMIN, 0) == []
    assert live(catalogue)["a"] == 3


def test_collected_generations_need_no_blobs_and_never_serve(catalogue: Catalogue) -> None:
    register(catalogue, "a")
    old = catalogue.generation("a", 3)
    before = catalogue.referenced()
    assert old.files["a@3 of build-1.json"].sha256 in before
    assert catalogue.collect([old, catalogue.generation("a", 4)], ADMIN, 0) == [old]
    after = catalogue.referenced()
    assert old.files["a@3 of build-1.json"].sha256 not in after
    # Nobody can go back to the router of that generation.
    assert catalogue.router(2).files == {}
    assert len(before) - len(after) == 2
    with pytest.raises(TransitionError, match="collected"):
        catalogue.activate("a", 3, ADMIN)
    assert live(catalogue)["a"] == 4


def test_of_an_expert_that_was_retired_lately_the_newest_generations_stay(catalogue: Catalogue) -> None:
    before = datetime.now(UTC)
    for _ in range(2):
        register(catalogue, "a")
    catalogue.set_state("a", "retired", ADMIN)
    assert [each.number for each in catalogue.collectable(1, before)] == [4, 3]
    found = catalogue.collectable(0)
    assert [each.number for each in found] == [5, 4, 3]
    gone = catalogue.collect(found, ADMIN, 2, before)
    assert [each.number for each in gone] == [3]
    catalogue.activate("a", 5, ADMIN)
    assert live(catalogue)["a"] == 5
    catalogue.set_state("a", "retired", ADMIN)
    after = datetime.now(UTC)
    assert [each.number for each in catalogue.collectable(2, after)] == [5, 4]


def test_an_expert_that_was_retired_before_a_rebuild_keeps_its_newest_generation_too(
    catalogue: Catalogue,
) -> None:
    before = datetime.now(UTC)
    catalogue.set_state("b", "retired", ADMIN)
    rebuilt(catalogue, "build-2", "a")
    assert [(each.name, each.number) for each in catalogue.collectable(1, before)] == [("a", 3)]


def test_routers_are_given_up_where_no_generation_is_and_without_need_nothing_is_locked(
    catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(catalogue, "a")
    catalogue.set_state("b", "retired", ADMIN)
    slow = catalogue.revision()
    catalogue.set_alias("see", "a", ADMIN)
    # It may be about to load a router.
    catalogue.beat(Replica("slow", 1, slow, BUILD))
    assert [it.name for it in catalogue.collect(catalogue.collectable(5), ADMIN, 5)] == ["b"]
    assert catalogue.router(2).files
    catalogue.beat(Replica("slow", 2, catalogue.revision(), BUILD))
    assert catalogue.collectable(5) == []
    assert catalogue.collect([], ADMIN, 5) == []
    assert not catalogue.router(2).files
    revision = catalogue.revision()
    monkeypatch.setattr(catalogue, "_change", None)
    assert catalogue.collect([], ADMIN, 5) == []
    assert catalogue.revision() == revision


def test_a_slow_store_does_not_hold_up_writers_until_all_blobs_are_deleted(
    catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collecting, "_DISCARD_SECONDS", 0.0)
    needed, *others = [digest("a@3 of build-1"), "1" * 64, "2" * 64]
    gone: list[str] = []
    assert catalogue.discard([needed, *others], gone.append) == gone == others[:1]
    assert catalogue.discard([needed], gone.append) == []


def test_pinned_blobs_stay_until_their_job_ends_or_their_replica_is_gone(catalogue: Catalogue) -> None:
    mine, ours = "1" * 64, "2" * 64
    job = submit(catalogue, "new")
    catalogue.claim("replica")
    catalogue.pin_blobs(f"{job.id}/1", [mine, mine])
    catalogue.pin_blobs(f"{job.id}/1", [mine])
    catalogue.pin_blobs("replica", [ours])
    gone: list[str] = []
    assert catalogue.discard([mine, ours, "3" * 64], gone.append) == gone == ["3" * 64]
    catalogue.fail(job.id, 1, REFUSED)
    assert mine not in catalogue.referenced()
    catalogue.drop_replica("replica")
    assert ours not in catalogue.referenced()
    catalogue.pin_blobs("someone", [ours])
    catalogue.unpin_blobs("someone")
    assert ours not in catalogue.referenced()


def test_a_bundle_is_switched_with_generations_of_its_own(catalogue: Catalogue) -> None:
    register(catalogue, "a")
    catalogue.set_state("b", "disabled", ADMIN)
    job = catalogue.submit("rebuild", {}, ADMIN, limit=9)
    with pytest.raises(TransitionError, match="rebuilt"):
        catalogue.submit("rebuild", {}, ADMIN, limit=9)
    catalogue.claim("replica")
    record = BundleRecord("build-2", "family", "{}")
    coming = [generation("a", 1, "build-2")]
    with pytest.raises(GenerationConflictError):
        catalogue.switch_bundle(job.id, 1, record, coming, None, made_from={"a": 3})
    with pytest.raises(TransitionError, match="'a' serves"):
        catalogue.switch_bundle(job.id, 1, record, [], None)
    made = router({"a": 1}, "build-2")
    done = catalogue.switch_bundle(job.id, 1, record, coming, made, made_from={"a": 4}, result={"x": 1})
    shot = served(catalogue)
    assert (done.state, shot.bundle.build_id, live(catalogue)) == ("succeeded", "build-2", {"a": 5})
    assert shot.experts["a"].build_id == "build-2"
    assert dict(shot.router.profiles) == {"a": 5}  # type: ignore[union-attr]
    assert [each.state for each in catalogue.bundles()] == ["active", "superseded"]
    with pytest.raises(TransitionError, match="another shared expert"):
        catalogue.activate("a", 4, ADMIN)
    with pytest.raises(TransitionError, match="another shared expert"):
        catalogue.set_state("b", "active", ADMIN)
    assert catalogue.switch_bundle(job.id, 1, record, coming, made) == done


def test_experts_that_a_bundle_lacks_are_retired_where_that_is_wanted(catalogue: Catalogue) -> None:
    job = catalogue.submit("rebuild", {}, ADMIN, limit=9)
    catalogue.claim("replica")
    record = BundleRecord("build-2", "family", "{}")
    catalogue.switch_bundle(job.id, 1, record, [generation("c", 1, "build-2")], None, absent="retire")
    assert live(catalogue) == {"c": 1}
    assert served(catalogue).router is None
    assert catalogue.expert("a").state == "retired"


def rebuilt(catalogue: Catalogue, build: str, *names: str, absent: Absent = "refuse") -> None:
    """Switch to another bundle with experts of these names and a router over them."""
    job = catalogue.submit("rebuild", {}, ADMIN, limit=9)
    claimed = catalogue.claim("replica")
    assert claimed is not None
    made = [generation(name, 1, build) for name in names]
    known = router(dict.fromkeys(names, 1), build)
    catalogue.switch_bundle(
        job.id, claimed.attempt, BundleRecord(build, "family", "{}"), made, known, absent=absent
    )


def state_of(catalogue: Catalogue) -> tuple[str, dict[str, int], dict[str, int]]:
    shot = served(catalogue)
    assert shot.router is not None
    return shot.bundle.build_id, live(catalogue), dict(shot.router.profiles)


def test_a_bundle_that_was_replaced_serves_again_with_what_served_then_and_back(catalogue: Catalogue) -> None:
    first = served(catalogue).bundle.build_id
    register(catalogue, "a")
    catalogue.activate("a", 3, ADMIN, router=2)
    catalogue.set_state("b", "disabled", ADMIN)
    before = state_of(catalogue)
    rebuilt(catalogue, "build-2", "a")
    after = state_of(catalogue)
    assert [(it.build_id, it.left is not None) for it in catalogue.bundles()] == [
        ("build-2", False),
        (first, True),
    ]
    back = catalogue.return_to(first, ADMIN)
    assert (back.build_id, back.state, back.left) == (first, "active", None)
    assert state_of(catalogue) == before
    assert catalogue.set_state("b", "active", ADMIN).generation == 1
    revision = catalogue.revision()
    assert catalogue.return_to(first, ADMIN) == back
    assert catalogue.revision() == revision
    catalogue.set_state("b", "disabled", ADMIN)
    catalogue.return_to("build-2", ADMIN)
    assert state_of(catalogue) == after
    assert catalogue.expert("b").state == "disabled"
    [entry, *_] = catalogue.audit(limit=1)
    assert (entry.action, entry.target, entry.detail["experts"]) == ("return", "build-2", {"a": 5})


def test_experts_that_came_after_a_bundle_refuse_its_return_or_come_back_with_theirs(
    catalogue: Catalogue,
) -> None:
    first = served(catalogue).bundle.build_id
    rebuilt(catalogue, "build-2", "a", "b", "c")
    catalogue.set_alias("see", "c", ADMIN)
    with pytest.raises(TransitionError, match="'c' serves"):
        catalogue.return_to(first, ADMIN)
    assert served(catalogue).bundle.build_id == "build-2"
    catalogue.return_to(first, ADMIN, absent="retire")
    assert live(catalogue) == {"a": 3, "b": 1}
    assert (catalogue.expert("c").state, catalogue.aliases()) == ("retired", {})
    catalogue.set_state("b", "retired", ADMIN)
    catalogue.return_to("build-2", ADMIN)
    assert live(catalogue) == {"a": 4, "c": 1}


def test_an_expert_that_was_retired_since_stays_so_though_its_name_was_given_anew(
    catalogue: Catalogue,
) -> None:
    first = served(catalogue).bundle.build_id
    rebuilt(catalogue, "build-2", "a", "b")
    catalogue.set_state("a", "retired", ADMIN)
    register(catalogue, "a")
    with pytest.raises(TransitionError, match="'a' serves"):
        catalogue.return_to(first, ADMIN)
    catalogue.return_to(first, ADMIN, absent="retire")
    assert live(catalogue) == {"b": 1}
    catalogue.return_to("build-2", ADMIN)
    assert live(catalogue) == {"a": 5, "b": 2}


def test_no_alias_may_hide_the_bundle_that_comes_back(catalogue: Catalogue) -> None:
    first = served(catalogue).bundle.build_id
    job = catalogue.submit("rebuild", {}, ADMIN, limit=9)
    catalogue.claim("replica")
    coming = [generation("a", 1, "build-2"), generation("b", 1, "build-2")]
    catalogue.switch_bundle(job.id, 1, BundleRecord("build-2", "other", "{}"), coming, None)
    catalogue.set_alias("family", "a", ADMIN)
    with pytest.raises(DuplicateExpertError, match="'family' is an alias"):
        catalogue.return_to(first, ADMIN)
    catalogue.remove_alias("family", ADMIN)
    assert catalogue.return_to(first, ADMIN).name == "family"


def test_what_is_unknown_or_never_served_cannot_be_returned_to(catalogue: Catalogue) -> None:
    for name in ("nothing", "x\0y", ""):
        with pytest.raises(RecordNotFoundError, match="no bundle"):
            catalogue.return_to(name, ADMIN)


def test_collection_keeps_the_way_back_to_the_bundle_that_was_replaced_last(catalogue: Catalogue) -> None:
    first = served(catalogue).bundle.build_id
    register(catalogue, "a")
    rebuilt(catalogue, "build-2", "a", "b")
    assert catalogue.collect(catalogue.collectable(2), ADMIN, 2)
    assert state_of(catalogue)[0] == "build-2"
    catalogue.return_to(first, ADMIN)
    assert live(catalogue) == {"a": 4, "b": 1}
    catalogue.return_to("build-2", ADMIN)
    rebuilt(catalogue, "build-3", "a", "b")
    gone = catalogue.collect(catalogue.collectable(2), ADMIN, 2)
    assert {(it.name, it.number) for it in gone} == {("a", 4), ("b", 1)}
    assert [it.left is not None for it in catalogue.bundles()] == [False, True, False]
    with pytest.raises(TransitionError, match="given up"):
        catalogue.return_to(first, ADMIN)
    # Whoever keeps one generation alone wants no way back.
    assert {(it.name, it.number) for it in catalogue.collectable(1)} == {("a", 5), ("b", 2)}
    catalogue.collect(catalogue.collectable(1), ADMIN, 1)
    with pytest.raises(TransitionError, match="given up"):
        catalogue.return_to("build-2", ADMIN)
    assert live(catalogue) == {"a": 6, "b": 3}


def test_a_watcher_hears_of_every_change_soon(catalogue: Catalogue) -> None:
    stop, heard = threading.Event(), threading.Condition()
    seen: list[int] = []

    def watch() -> None:
        for revision in catalogue.watch(stop, 0.05 if catalogue.dialect == "sqlite" else 30.0):
            with heard:
                seen.append(revision)
                heard.notify_all()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for alias in ("x", "y", "z"):
            catalogue.set_alias(alias, "a", ADMIN)
            wanted = catalogue.revision()
            with heard:
                # Far less than what it would take PostgreSQL's watcher to ask by itself.
                assert heard.wait_for(lambda wanted=wanted: seen and seen[-1] >= wanted, 10)
    finally:
        stop.set()
        watcher.join(10)
    assert not watcher.is_alive()
    assert seen == sorted(set(seen))


def test_a_pin_takes_a_router_along_or_changes_nothing(catalogue: Catalogue) -> None:
    register(catalogue, "a")
    register(catalogue, "b")
    before = state_of(catalogue)
    with pytest.raises(StaleRouterError):
        catalogue.pin("a", 3, ADMIN, router=2)
    with pytest.raises(RecordNotFoundError):
        catalogue.pin("a", 3, ADMIN, router=9)
    assert (state_of(catalogue), catalogue.expert("a").pinned) == (before, False)
    catalogue.activate("b", 1, ADMIN, router=3)
    assert catalogue.pin("a", 3, ADMIN, expected=4, router=2).pinned
    assert live(catalogue) == {"a": 3, "b": 1}
    assert state_of(catalogue)[2] == {"a": 3, "b": 1}


def test_an_experts_name_that_is_an_alias_by_now_is_not_pinned(catalogue: Catalogue) -> None:
    register(catalogue, "new", activate=False)
    catalogue.set_alias("new", "a", ADMIN)
    with pytest.raises(DuplicateExpertError):
        catalogue.pin("new", 1, ADMIN)
    assert "new" not in live(catalogue)


def test_the_router_with_a_generation_is_the_newest_that_knows_the_others_as_they_are(
    catalogue: Catalogue,
) -> None:
    assert catalogue.router_with("a", 3) == 2
    register(catalogue, "a")
    assert (catalogue.router_with("a", 3), catalogue.router_with("a", 4)) == (2, 3)
    register(catalogue, "b", activate=False)
    assert catalogue.router_with("b", 2) == 4
    job = catalogue.submit("reprofile", {}, ADMIN, name="a", replace=True, limit=9)
    claimed = catalogue.claim("replica")
    assert claimed is not None
    catalogue.publish(job.id, claimed.attempt, None, router({"a": 4, "b": 1}), 3)
    assert catalogue.router_with("a", 4) == 5
    assert catalogue.router_with("a", 3) == 2
    register(catalogue, "b")
    assert catalogue.router_with("a", 3) is None
    for name, number in (("a", 9), ("a", -1), ("a", 2**70), ("c", 1), ('x"y', 1), ("x\0y", 1)):
        assert catalogue.router_with(name, number) is None


def test_without_a_router_there_is_none_for_any_generation(catalogue_url: str) -> None:
    bare = Catalogue.open(catalogue_url)
    assert bare.router_with("a", 1) is None
    adopt(bare, routed=False)
    assert bare.router_with("a", 3) is None
    bare.close()


def test_a_job_that_is_given_back_in_good_order_loses_none_of_its_attempts(catalogue: Catalogue) -> None:
    job = submit(catalogue, "new")
    for attempt, attempts in enumerate((None, 2, None, None), 1):
        claimed = catalogue.claim("here")
        assert claimed is not None
        assert claimed.attempt == attempt
        assert [it.state for it in catalogue.requeue("here", attempts)] == ["queued"]
    assert catalogue.claim("here").attempt == 5  # type: ignore[union-attr]
    told = JobFailure("request_failed", "its process died")
    [ended] = catalogue.requeue("here", 2, failure=told, report={"rank": 4})
    assert (ended.id, ended.state, ended.failure) == (job.id, "failed", told)
    assert catalogue.generation("new", 1).report == {"rank": 4}
