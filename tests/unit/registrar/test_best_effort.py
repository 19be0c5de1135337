"""What can do without the catalogue does, whether it is gone or its disk is full."""

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from experts.errors import CatalogueError, CatalogueFullError
from experts.registry.catalogue import Catalogue
from service.errors import TwinserveError
from service.registrar.calls import Calls
from service.registrar.registrar import Registrar
from tests.unit.registry.catalogue import ADMIN

troubles = pytest.mark.parametrize("trouble", [CatalogueError("gone"), CatalogueFullError("full")])


@pytest.fixture
def registrar(catalogue: Catalogue) -> Iterator[Registrar]:
    calls = Calls(1)
    follower: Any = SimpleNamespace(
        problem="", known=1, snapshot=catalogue.snapshot(), broken=dict[str, str], reach=None
    )
    parts: dict[str, Any] = dict.fromkeys(("blobs", "live", "sources", "sink", "wake", "fetch"))
    yield Registrar(
        catalogue,
        follower=follower,
        calls=calls,
        **parts,
        limit=8,
        keep_generations=2,
        replica="here",
        writable=True,
    )
    calls.close()


def fail(monkeypatch: pytest.MonkeyPatch, catalogue: Catalogue, name: str, trouble: Exception) -> None:
    def failing(*_: object, **__: object) -> None:
        raise trouble

    monkeypatch.setattr(catalogue, name, failing)


@troubles
def test_weights_are_sent_though_the_audit_log_cannot_be_written(
    registrar: Registrar, monkeypatch: pytest.MonkeyPatch, trouble: Exception
) -> None:
    fail(monkeypatch, registrar.catalogue, "record", trouble)
    asyncio.run(registrar.exported(ADMIN, "a", {}))


@troubles
def test_the_state_tells_what_keeps_the_catalogue_from_answering(
    registrar: Registrar, monkeypatch: pytest.MonkeyPatch, trouble: Exception
) -> None:
    fail(monkeypatch, registrar.catalogue, "replicas", trouble)
    state = asyncio.run(registrar.state())
    assert "registry" in state.problem
    assert list(state.replicas) == []


@troubles
def test_a_change_that_was_made_is_told_though_it_cannot_be_followed(
    registrar: Registrar, monkeypatch: pytest.MonkeyPatch, trouble: Exception
) -> None:
    fail(monkeypatch, registrar.catalogue, "revision", trouble)
    asyncio.run(registrar.follow())


@troubles
def test_a_refusal_is_told_though_it_cannot_be_audited(
    registrar: Registrar, monkeypatch: pytest.MonkeyPatch, trouble: Exception
) -> None:
    fail(monkeypatch, registrar.catalogue, "record", trouble)
    with pytest.raises(TwinserveError, match="nobody"):
        asyncio.run(registrar.set_alias("other", "nobody", ADMIN))
