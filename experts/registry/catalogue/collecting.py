"""Which blobs are needed, and which generations may be given up so that theirs are not."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, delete, insert, select, update

from experts.registry.catalogue import tables
from experts.registry.catalogue.change import Connected
from experts.registry.catalogue.rows import generation_of
from experts.registry.records import Actor, Generation

_DISCARD_SECONDS = 1.0
"""After so long no further blob is deleted in one transaction: a slow store shall not stop all writers."""


class Collecting(Connected):
    """Needs, and garbage. All raise CatalogueError where the database cannot be used."""

    def pin_blobs(self, holder: str, digests: Iterable[str]) -> None:
        """Keep blobs that no generation lists yet; call it before they are stored.

        What is held by a job's id, or by that and `/…`, is let go when the job ends or is queued again; what is
        held by a replica's id, when the replica is dropped.

        Args:
            holder: whoever needs them.
            digests: sha256 each; those that it holds already are held on.
        """
        with self._change() as change:
            columns = tables.pins.c
            held = set(
                change.connection.execute(select(columns.sha256).where(columns.holder == holder)).scalars()
            )
            new = [{"holder": holder, "sha256": digest} for digest in sorted(set(digests) - held)]
            if new:
                change.connection.execute(insert(tables.pins), new)

    def unpin_blobs(self, holder: str) -> None:
        """Let go of all that a holder kept."""
        with self._database.write() as connection:
            connection.execute(delete(tables.pins).where(tables.pins.c.holder == holder))

    def referenced(self) -> dict[str, int]:
        """Digest → bytes of every blob that something needs; 0 bytes where the size is not known yet."""
        with self._database.read() as connection:
            return _referenced(connection)

    def discard(self, digests: Iterable[str], delete: Callable[[str], object]) -> list[str]:
        """Delete blobs that nothing needs, while nothing can come to need them; those that were deleted.

        All writers wait meanwhile. So where the store is slow some are left, but one goes if any can: called again
        with the rest until none went, all of them.

        Args:
            digests: candidates; a few hundred at most.
            delete: called with each that is not needed.
        """
        with self._change() as change:
            needed = _referenced(change.connection)
            until = time.monotonic() + _DISCARD_SECONDS
            gone = []
            for digest in digests:
                if digest in needed:
                    continue
                delete(digest)
                gone.append(digest)
                if time.monotonic() >= until:
                    break
            return gone

    def collectable(self, keep: int, retired_before: datetime | None = None) -> list[Generation]:
        """Generations that could be given up: ready, not serving, not tried out, and used by no replica.

        Of every expert that is not retired the newest `keep` of the served bundle stay, for rollbacks; where that is
        more than one, what served with the bundle before stays too, for a way back.

        Args:
            keep: how many.
            retired_before: of experts that were retired later the newest `keep` of each bundle stay, so that they
                can come back; None: all of retired ones go.
        """
        with self._database.read() as connection:
            garbage = _Garbage(connection, keep, retired_before)
            return [generation_of(row) for row in garbage.generations()]

    def collect(
        self,
        generations: Sequence[Generation],
        actor: Actor,
        keep: int,
        retired_before: datetime | None = None,
    ) -> list[Generation]:
        """Give up generations, and routers and bundles that nobody could go back to without them; those that were.

        One that came into use again since it was found collectable, or is one of those to keep by now, stays.

        Args:
            generations: those that `collectable` found.
            actor: who asks.
            keep, retired_before: as it was told.
        """
        wanted = {(generation.name, generation.number) for generation in generations}
        with self._database.read() as connection:
            # Most looks find nothing, and need no lock to see it.
            if not any(_Garbage(connection, keep, retired_before).of(wanted)):
                return []
        with self._change() as change:
            rows, routers, bundles = _Garbage(change.connection, keep, retired_before).of(wanted)
            columns = tables.generations.c
            for row in rows:
                change.connection.execute(
                    update(tables.generations)
                    .where(columns.name == row.name, columns.number == row.number)
                    .values(state="collected", files={}, origin={}, profile=None, prompts=None)
                )
                change.note(actor, "collect", row.name, {"generation": row.number})
            if routers:
                number = tables.routers.c.number
                change.connection.execute(update(tables.routers).where(number.in_(routers)).values(files={}))
            if bundles:
                build = tables.bundles.c.build_id
                given_up: dict[str, Any] = {"files": {}, "way_back": None}
                change.connection.execute(update(tables.bundles).where(build.in_(bundles)).values(**given_up))
            if routers or bundles:
                change.note(actor, "collect", "routers", {"routers": routers, "bundles": bundles})
            return [generation_of(row) for row in rows]


@dataclass(frozen=True, slots=True)
class _Use:
    """What is in use.

    Attributes:
        experts: all rows by name.
        build: the bundle that is served.
        routers: numbers of the current router and those of trials.
        builds: bundles that are served anywhere.
        leases: "name@number" of every replica's requests.
        revision: the oldest that a replica serves; None where there is no replica.
        behind: whether that is not the newest.
    """

    experts: Mapping[str, Any]
    build: str | None
    routers: set[int]
    builds: set[str | None]
    leases: set[str]
    revision: int | None
    behind: bool


@dataclass(frozen=True, slots=True)
class _WayBack:
    """What must stay so that the bundle before can serve again; nothing where there is none.

    Attributes:
        experts: name → number.
    """

    build: str | None = None
    experts: Mapping[str, int] = field(default_factory=dict)
    router: int | None = None


def _way_back(connection: Connection, keep: int) -> _WayBack:
    """To the bundle that was replaced last. Who keeps one generation alone wants no way back."""
    columns = tables.bundles.c
    rows = connection.execute(select(columns.build_id, columns.way_back)).all()
    ways = [row for row in rows if row.way_back is not None]
    if keep < 2 or not ways:
        return _WayBack()
    last = max(ways, key=lambda row: row.way_back["revision"])
    return _WayBack(last.build_id, last.way_back["experts"], last.way_back["router"])


def _use(connection: Connection) -> _Use:
    state = connection.execute(select(tables.registry)).one()
    experts = {row.name: row for row in connection.execute(select(tables.experts))}
    replicas = connection.execute(select(tables.replicas)).all()
    routers = {row.trial["router"] for row in experts.values() if row.trial} | {state.router}
    oldest = min((row.revision for row in replicas), default=None)
    return _Use(
        experts=experts,
        build=state.build_id,
        routers={number for number in routers if number is not None},
        builds={state.build_id} | {row.build_id for row in replicas},
        leases={lease for row in replicas for lease in row.leases},
        revision=oldest,
        behind=oldest is not None and oldest < state.revision,
    )


class _Garbage:
    """What could be given up, as one transaction sees it."""

    def __init__(self, connection: Connection, keep: int, retired_before: datetime | None) -> None:
        self._connection = connection
        self._keep = keep
        self._retired_before = retired_before
        self._use = _use(connection)
        self._back = _way_back(connection, keep)

    def of(self, wanted: set[tuple[str, int]]) -> tuple[list[Any], list[int], list[str]]:
        """Generations that can go, of those only; routers that are useless without them; useless bundles."""
        rows = [row for row in self.generations() if (row.name, row.number) in wanted]
        return rows, self._routers({(row.name, row.number) for row in rows}), self._bundles()

    def generations(self) -> list[Any]:
        """All that can go, by name and the newest first."""
        use = self._use
        columns = tables.generations.c
        rows = self._connection.execute(
            select(tables.generations)
            .where(columns.state == "ready")
            .order_by(columns.name, columns.number.desc())
        ).all()
        known = _profiles(self._connection, use.routers)
        kept: dict[tuple[str, str], int] = defaultdict(int)
        found = []
        for row in rows:
            expert = use.experts[row.name]
            retired = expert.state == "retired"
            if self._lately(expert) if retired else row.build_id == use.build:
                # Each bundle's count by itself: one that was retired by mistake is in no bundle built since.
                kept[row.name, row.build_id] += 1
                if kept[row.name, row.build_id] <= self._keep:
                    continue
            tried = expert.trial is not None and expert.trial["generation"] == row.number
            serves = not retired and (expert.generation == row.number or tried)
            behind = row.left_at is not None and use.revision is not None and use.revision < row.left_at
            leased = f"{row.name}@{row.number}" in use.leases
            profiled = not retired and known.get(row.name) == row.number
            returns = self._back.experts.get(row.name) == row.number
            if not (serves or behind or leased or profiled or returns):
                found.append(row)
        return found

    def _lately(self, expert: Any) -> bool:
        """Whether a retired expert was retired so late that it may have to come back."""
        return self._retired_before is not None and expert.updated >= self._retired_before

    def _routers(self, gone: set[tuple[str, int]]) -> list[int]:
        """Routers with files that neither serve nor could: of another bundle, or of generations given up."""
        columns = tables.generations.c
        ready = {
            (row.name, row.number)
            for row in self._connection.execute(
                select(columns.name, columns.number).where(columns.state == "ready")
            )
        } - gone
        found = []
        for row in self._connection.execute(select(tables.routers)):
            fits = row.build_id == self._use.build and set(row.profiles.items()) <= ready
            usable = fits or row.number == self._back.router
            # A replica that is behind may be about to load it.
            if row.files and row.number not in self._use.routers and not usable and not self._use.behind:
                found.append(row.number)
        return found

    def _bundles(self) -> list[str]:
        """Superseded ones with files or a way back that nobody serves, nor could go back to."""
        used = self._use.builds | {self._back.build}
        rows = self._connection.execute(select(tables.bundles).where(tables.bundles.c.state == "superseded"))
        return [row.build_id for row in rows if (row.files or row.way_back) and row.build_id not in used]


def _profiles(connection: Connection, routers: set[int]) -> dict[str, int]:
    """Expert → the generation whose profile the current router or a trial's has; it is refitted from that."""
    columns = tables.routers.c
    rows = connection.execute(select(columns.profiles).where(columns.number.in_(routers))).scalars()
    return {name: number for profiles in rows for name, number in profiles.items()}


def _referenced(connection: Connection) -> dict[str, int]:
    found: dict[str, int] = dict.fromkeys(connection.execute(select(tables.pins.c.sha256)).scalars(), 0)
    columns = tables.generations.c
    entries: list[Mapping[str, Any]] = []
    query = select(columns.files, columns.origin, columns.profile, columns.prompts)
    for row in connection.execute(query.where(columns.state == "ready")):
        entries += [*row.files.values(), *row.origin.values()]
        entries += [entry for entry in (row.profile, row.prompts) if entry is not None]
    for files in connection.execute(select(tables.routers.c.files)).scalars():
        entries += files.values()
    for files in connection.execute(select(tables.bundles.c.files)).scalars():
        entries += files.values()
    waiting = select(tables.jobs.c.request).where(tables.jobs.c.state.in_(("queued", "running")))
    for request in connection.execute(waiting).scalars():
        entries += request.get("files", {}).values()  # of an upload
    found |= {entry["sha256"]: entry["nbytes"] for entry in entries}
    return found
