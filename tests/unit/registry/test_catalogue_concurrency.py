"""Two admins at once, and many: exactly one wins, and everybody else is told so."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from experts.errors import ExpertsError, GenerationConflictError, JobLostError, TransitionError
from experts.registry.catalogue import Catalogue
from experts.registry.records import Actor, Job, Progress, Replica
from tests.unit.registry.catalogue import ADMIN, BUILD, adopt, finish, publish, register, submit

MANY = 12


@pytest.fixture
def pair(catalogue_url: str) -> Iterator[list[Catalogue]]:
    """One database, opened by two servers at once."""
    start = threading.Barrier(2)

    def open_one(_: int) -> Catalogue:
        start.wait(30)
        return Catalogue.open(catalogue_url)

    with ThreadPoolExecutor(2) as threads:
        opened = list(threads.map(open_one, range(2)))
    adopt(opened[0])
    yield opened
    for catalogue in opened:
        catalogue.close()


def together(pair: list[Catalogue], act: Callable[[Catalogue, int], Any]) -> list[Any]:
    """What each of many threads got, or the error that it was told."""
    start = threading.Barrier(MANY)

    def run(index: int) -> Any:
        start.wait(30)
        try:
            return act(pair[index % 2], index)
        except ExpertsError as error:
            return error

    with ThreadPoolExecutor(MANY) as threads:
        return list(threads.map(run, range(MANY)))


def test_one_of_many_registrations_of_a_new_name_is_taken(pair: list[Catalogue]) -> None:
    answers = together(pair, lambda c, index: submit(c, "new", Actor(f"admin {index}"), replace=False))
    won = [answer for answer in answers if isinstance(answer, Job)]
    assert len(won) == 1
    assert {type(answer) for answer in answers} == {Job, TransitionError}
    assert [job.id for job in pair[0].jobs()] == [won[0].id]


def test_one_of_many_switches_from_the_same_generation_wins(pair: list[Catalogue]) -> None:
    for _ in range(MANY):
        register(pair[0], "a")
    before = pair[0].revision()
    answers = together(pair, lambda c, index: c.activate("a", 3 + index, ADMIN, expected=3 + MANY))
    won = [answer for answer in answers if not isinstance(answer, ExpertsError)]
    assert len(won) == 1
    assert sum(isinstance(answer, GenerationConflictError) for answer in answers) == MANY - 1
    assert pair[1].snapshot().experts["a"].number == won[0].generation  # type: ignore[union-attr]
    assert pair[0].revision() == before + 1


def test_the_same_key_at_the_same_time_makes_one_job(pair: list[Catalogue]) -> None:
    answers = together(pair, lambda c, _: submit(c, "new", idempotency_key="once"))
    assert len({answer.id for answer in answers}) == 1
    assert len(pair[0].jobs()) == 1


def test_many_names_at_once_all_get_their_turn(pair: list[Catalogue]) -> None:
    answers = together(pair, lambda c, index: submit(c, f"n{index}"))
    assert len({answer.id for answer in answers}) == MANY
    assert [job.id for job in pair[0].jobs()] == [job.id for job in pair[1].jobs()]
    for _ in range(MANY):
        assert finish(pair[1]).state == "succeeded"
    assert len(pair[0].snapshot().experts) == MANY + 2  # type: ignore[union-attr]


def test_a_job_is_claimed_by_one_replica(pair: list[Catalogue]) -> None:
    submit(pair[0], "one")
    submit(pair[0], "two")
    answers = together(pair, lambda c, index: c.claim(f"replica {index}"))
    claimed = [answer for answer in answers if answer is not None]
    assert len(claimed) == 1
    assert pair[0].job(claimed[0].id).owner == claimed[0].owner


def test_a_job_is_published_or_cancelled_or_lost_and_never_two_of_them(pair: list[Catalogue]) -> None:
    submit(pair[0], "a")
    job = pair[0].claim("replica")
    assert job is not None
    changes: list[Callable[[Catalogue], Any]] = [
        lambda c: publish(c, job),
        lambda c: c.cancel(job.id, ADMIN),
        lambda c: c.requeue("replica", 3),
        lambda c: c.progress(job.id, job.attempt, Progress(50.0)),
    ]
    answers = together(pair, lambda c, index: changes[index % len(changes)](c))
    assert all(
        not isinstance(answer, ExpertsError) or isinstance(answer, JobLostError | TransitionError)
        for answer in answers
    )
    ended = pair[0].job(job.id)
    live = pair[0].snapshot().experts["a"].number  # type: ignore[union-attr]
    assert (live == 4) == (ended.state == "succeeded")
    assert pair[0].generation("a", 4).state in ("ready", "failed", "registering")
    assert (pair[0].generation("a", 4).state == "ready") == (ended.state == "succeeded")


def test_revisions_are_counted_without_a_gap_and_snapshots_are_of_one_moment(pair: list[Catalogue]) -> None:
    register(pair[0], "a")
    before = pair[0].revision()
    rounds = 8

    def change_or_look(catalogue: Catalogue, index: int) -> list[int]:
        seen = []
        for turn in range(rounds):
            if index % 3 == 0:
                # Together they go one way: expert and router change in one transaction.
                number = 3 + turn % 2
                with_router = next(
                    each.number for each in catalogue.routers() if each.profiles["a"] == number
                )
                catalogue.activate("a", number, ADMIN, router=with_router)
            elif index % 3 == 1:
                catalogue.beat(Replica(f"replica {index}", turn, before, BUILD))
            shot = catalogue.snapshot()
            assert shot is not None
            assert shot.router is not None
            assert shot.experts["a"].number == shot.router.profiles["a"]
            seen.append(shot.revision)
        return seen

    answers = together(pair, change_or_look)
    assert all(seen == sorted(seen) for seen in answers)
    writers = len(range(0, MANY, 3))
    assert pair[0].revision() == before + writers * rounds
    revisions = [entry.revision for entry in pair[1].audit(limit=10_000) if entry.revision > before]
    assert sorted(revisions) == list(range(before + 1, before + writers * rounds + 1))


def test_a_blob_that_is_pinned_before_it_is_stored_is_never_deleted(pair: list[Catalogue]) -> None:
    stored: set[str] = set()
    digests = [f"{index:064x}" for index in range(MANY)]

    def store_or_sweep(catalogue: Catalogue, index: int) -> None:
        if index % 2:
            catalogue.pin_blobs(f"worker {index}", [digests[index]])
            stored.add(digests[index])
        else:
            for _ in range(5):
                catalogue.discard(list(stored), stored.discard)

    assert together(pair, store_or_sweep) == [None] * MANY
    assert stored == {digests[index] for index in range(1, MANY, 2)}
