"""An older generation serves again at once, whatever goes live beside it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from experts.registry.catalogue import Catalogue
from service.errors import WrongStateError
from service.registrar.experts import ExpertChanges
from tests.unit.registry.catalogue import ADMIN, generation, register


def serve(catalogue: Catalogue, how: str, number: int, expected: int | None = None) -> int | None:
    """Switch `a` by a change of the catalogue; the router that went live with it."""
    parts: dict[str, Any] = dict.fromkeys(
        ("blobs", "live", "follower", "sources", "calls", "sink", "wake", "fetch")
    )
    changes = ExpertChanges(catalogue, **parts, limit=8, keep_generations=2, replica="here", writable=True)
    return changes._serve(getattr(catalogue, how), catalogue.generation("a", number), ADMIN, expected)


def live(catalogue: Catalogue) -> tuple[int, dict[str, int]]:
    """The generation of `a` that serves, and whose profiles the router has."""
    snapshot = catalogue.snapshot()
    assert snapshot is not None
    assert snapshot.router is not None
    return snapshot.experts["a"].number, dict(snapshot.router.profiles)


both = pytest.mark.parametrize("how", ["activate", "pin"])


@both
def test_a_generation_goes_back_with_the_router_of_its_time(catalogue: Catalogue, how: str) -> None:
    register(catalogue, "a")
    assert serve(catalogue, how, 3) == 2
    assert live(catalogue) == (3, {"a": 3, "b": 1})


@both
def test_a_router_that_goes_live_in_between_does_not_refuse_a_rollback(
    catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    register(catalogue, "a")
    change, met = getattr(catalogue, how), []

    def raced(*arguments: Any, **options: Any) -> Any:
        if not met:
            met.append(register(catalogue, "c"))
        return change(*arguments, **options)

    monkeypatch.setattr(catalogue, how, raced)
    # No router knows `c` and the older generation of `a` together.
    assert serve(catalogue, how, 3, 4) is None
    assert live(catalogue) == (3, {"a": 4, "b": 1, "c": 1})


def test_a_router_that_was_given_up_does_not_refuse_a_rollback(catalogue: Catalogue) -> None:
    register(catalogue, "a")
    catalogue.set_state("b", "retired", ADMIN)
    gone = catalogue.collect(catalogue.collectable(5), ADMIN, 5)
    assert [(it.name, it.number) for it in gone] == [("b", 1)]
    assert not catalogue.router(2).files
    assert serve(catalogue, "activate", 3, 4) is None
    assert live(catalogue)[0] == 3


def test_another_generation_is_pinned_with_its_router_in_one_change(catalogue: Catalogue) -> None:
    register(catalogue, "a")
    revision = catalogue.revision()
    assert serve(catalogue, "pin", 3, 4) == 2
    assert catalogue.revision() == revision + 1
    assert catalogue.expert("a").pinned
    [entry, *_] = catalogue.audit(limit=1)
    assert (entry.action, entry.detail) == ("pin", {"from": 4, "to": 3, "router": 2})


OWN, OTHER = "build-1", "build-2"


@pytest.mark.parametrize(
    ("builds", "current", "found"),
    [
        ((OWN, OWN, OWN), 3, 2),
        ((OWN, OTHER, OWN), 3, 1),
        ((OWN, OTHER, OWN, OTHER), 4, 2),
    ],
)
def test_a_rollback_goes_to_the_newest_older_generation_of_the_same_bundle(
    catalogue: Catalogue, builds: Sequence[str], current: int, found: int
) -> None:
    generations = [generation("a", number, build) for number, build in enumerate(builds, 1)][::-1]
    expert = replace(catalogue.expert("a"), generation=current)
    assert ExpertChanges._before(expert, generations) == found


def test_there_is_no_rollback_to_another_bundle_s_generation(catalogue: Catalogue) -> None:
    generations = [generation("a", 2, OTHER), generation("a", 1, OWN)]
    with pytest.raises(WrongStateError, match="no older ready generation"):
        ExpertChanges._before(replace(catalogue.expert("a"), generation=2), generations)
