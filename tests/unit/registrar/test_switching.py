"""An older generation serves again at once, whatever goes live beside it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experts.registry.catalogue import Catalogue
from service.registrar.experts import ExpertChanges
from tests.unit.registry.catalogue import ADMIN, adopt, register


@pytest.fixture
def catalogue(tmp_path: Path) -> Iterator[Catalogue]:
    opened = Catalogue.open(f"sqlite:///{tmp_path / 'catalogue.sqlite'}")
    adopt(opened)
    yield opened
    opened.close()


def changes(catalogue: Catalogue) -> ExpertChanges:
    parts: dict[str, Any] = dict.fromkeys(("blobs", "live", "follower", "sources", "calls", "sink", "wake"))
    return ExpertChanges(catalogue, **parts, limit=8, keep_generations=2, replica="here", writable=True)


def test_a_generation_goes_back_with_the_router_of_its_time(catalogue: Catalogue) -> None:
    register(catalogue, "a")
    assert changes(catalogue)._activate(catalogue.generation("a", 3), ADMIN, None) == 2
    snapshot = catalogue.snapshot()
    assert snapshot is not None
    assert snapshot.router is not None
    assert (snapshot.experts["a"].number, snapshot.router.number) == (3, 2)


def test_a_router_that_goes_live_in_between_does_not_refuse_a_rollback(
    catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(catalogue, "a")
    activate, met = catalogue.activate, []

    def raced(*arguments: Any, **options: Any) -> Any:
        if not met:
            met.append(register(catalogue, "c"))
        return activate(*arguments, **options)

    monkeypatch.setattr(catalogue, "activate", raced)
    # No router knows `c` and the older generation of `a` together.
    assert changes(catalogue)._activate(catalogue.generation("a", 3), ADMIN, 4) is None
    snapshot = catalogue.snapshot()
    assert snapshot is not None
    assert snapshot.router is not None
    assert (snapshot.experts["a"].number, dict(snapshot.router.profiles)) == (3, {"a": 4, "b": 1, "c": 1})


def test_a_router_that_was_given_up_does_not_refuse_a_rollback(catalogue: Catalogue) -> None:
    register(catalogue, "a")
    catalogue.set_state("b", "retired", ADMIN)
    assert [(it.name, it.number) for it in catalogue.collect(catalogue.collectable(5), ADMIN)] == [("b", 1)]
    assert not catalogue.router(2).files
    assert changes(catalogue)._activate(catalogue.generation("a", 3), ADMIN, 4) is None
    snapshot = catalogue.snapshot()
    assert snapshot is not None
    assert snapshot.experts["a"].number == 3
