"""What a server does for its registry unasked, as an operator sees it."""

import asyncio
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, select, update

from experts.registry.catalogue import tables
from service import settings
from service.registrar.replica import Heartbeat
from service.registrar.work import Supervisor
from tests.api.harness import ADMIN_KEY, eventually, serving
from tests.api.operators import Operator
from tests.fixtures.tiny import TinyFamily


def test_a_server_collects_by_itself_and_does_not_where_that_is_off(
    family: TinyFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "_OFTEN_SECONDS", 0.05)
    options: dict[str, Any] = {"admin_key": ADMIN_KEY, "state_dir": tmp_path / "state"}
    with serving(family.bundle, collect_seconds=0, **options) as served:
        admin = Operator(served)
        assert admin.ask("DELETE", "/experts/beta").status_code == 200
        assert state_of_beta(admin) == "ready"
    age(tmp_path / "state" / "catalogue.sqlite", timedelta(days=31))
    with serving(family.bundle, collect_seconds=0.05, **options) as served:
        admin = Operator(served)
        assert eventually(lambda: state_of_beta(admin) == "collected")
        [line] = [it for it in admin.get("/audit", target="beta")["data"] if it["action"] == "collect"]
        assert line["actor"] == "system"
        assert served.metric('twinserve_registry_collected_total{kind="generations"}') == 1
        assert admin.text(model="alpha")[1] == {"alpha": 1}


def test_a_server_that_stops_beats_until_its_worker_has_ended(
    family: TinyFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    leave = Heartbeat.leave

    async def work(_: Supervisor) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            told.append("the worker is told")
            await asyncio.sleep(0.2)
            told.append("the worker has ended")

    async def beat(_: Heartbeat) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            told.append("the beat has ended")

    async def left(heartbeat: Heartbeat) -> None:
        told.append("it leaves")
        await leave(heartbeat)

    monkeypatch.setattr(Supervisor, "run", work)
    monkeypatch.setattr(Heartbeat, "run", beat)
    monkeypatch.setattr(Heartbeat, "leave", left)
    with serving(family.bundle, state_dir=tmp_path / "state"):
        pass
    assert told == ["the worker is told", "the worker has ended", "the beat has ended", "it leaves"]


def age(catalogue: Path, by: timedelta) -> None:
    """Let all changes of experts lie further back."""
    engine = create_engine(f"sqlite:///{catalogue}")
    name, updated = tables.experts.c.name, tables.experts.c.updated
    with engine.begin() as connection:
        for row in connection.execute(select(name, updated)).all():
            connection.execute(
                update(tables.experts).where(name == row.name).values(updated=row.updated - by)
            )
    engine.dispose()


def state_of_beta(admin: Operator) -> str:
    [generation] = admin.get("/experts/beta/generations")["data"]
    return str(generation["state"])
