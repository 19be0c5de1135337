"""Which blobs are needed, and which generations may be given up so that theirs are not."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, delete, insert, select, update

from experts.registry.catalogue import tables
from experts.registry.catalogue.change import Connected
from experts.registry.catalogue.rows import generation_of
from experts.registry.records import Actor, Generation


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

        Args:
            digests: candidates; a few hundred at most, since all writers wait.
            delete: called with each that is not needed.
        """
        with self._change() as change:
            needed = _referenced(change.connection)
            gone = [digest for digest in digests if digest not in needed]
            for digest in gone:
                delete(digest)
            return gone

    def collectable(self, keep: int) -> list[Generation]:
        """Generations that could be given up: ready, not serving, not tried out, and used by no replica.

        Of every expert that is not retired the newest `keep` of the served bundle stay, for rollbacks; where that is
        more than one, what served with the bundle before stays too, for a way back.
        """
        with self._database.read() as connection:
            return [generation_of(row) for row in _collectable(connection, keep)]

    def collect(self, generations: Sequence[Generation], actor: Actor, keep: int = 0) -> list[Generation]:
        """Give up generations, and routers and bundles that nobody could go back to without them; those that were.

        One that came into use again since it was found collectable, or is one of those to `keep` by now, stays.
        """
        with self._change() as change:
            wanted = {(generation.name, generation.number) for generation in generations}
            rows = [row for row in _collectable(change.connection, keep) if (row.name, row.number) in wanted]
            columns = tables.generations.c
            for row in rows:
                change.connection.execute(
                    update(tables.generations)
                    .where(columns.name == row.name, columns.number == row.number)
                    .values(state="collected", files={}, origin={}, profile=None, prompts=None)
                )
                change.note(actor, "collect", row.name, {"generation": row.number})
            routers = _useless_routers(change.connection, keep)
            if routers:
                number = tables.routers.c.number
                change.connection.execute(update(tables.routers).where(number.in_(routers)).values(files={}))
            bundles = _useless_bundles(change.connection, keep)
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
    """

    experts: Mapping[str, Any]
    build: str | None
    routers: set[int]
    builds: set[str | None]
    leases: set[str]
    revision: int | None


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
    return _Use(
        experts=experts,
        build=state.build_id,
        routers={number for number in routers if number is not None},
        builds={state.build_id} | {row.build_id for row in replicas},
        leases={lease for row in replicas for lease in row.leases},
        revision=min((row.revision for row in replicas), default=None),
    )


def _collectable(connection: Connection, keep: int) -> list[Any]:
    use = _use(connection)
    columns = tables.generations.c
    rows = connection.execute(
        select(tables.generations)
        .where(columns.state == "ready")
        .order_by(columns.name, columns.number.desc())
    ).all()
    known = _profiles(connection, use.routers)
    back = _way_back(connection, keep).experts
    kept: dict[str, int] = defaultdict(int)
    found = []
    for row in rows:
        expert = use.experts[row.name]
        retired = expert.state == "retired"
        if row.build_id == use.build and not retired:
            kept[row.name] += 1
            if kept[row.name] <= keep:
                continue
        tried = expert.trial is not None and expert.trial["generation"] == row.number
        serves = not retired and (expert.generation == row.number or tried)
        behind = row.left_at is not None and use.revision is not None and use.revision < row.left_at
        leased = f"{row.name}@{row.number}" in use.leases
        profiled = not retired and known.get(row.name) == row.number
        returns = back.get(row.name) == row.number
        if not (serves or behind or leased or profiled or returns):
            found.append(row)
    return found


def _profiles(connection: Connection, routers: set[int]) -> dict[str, int]:
    """Expert → the generation whose profile the current router or a trial's has; it is refitted from that."""
    columns = tables.routers.c
    rows = connection.execute(select(columns.profiles).where(columns.number.in_(routers))).scalars()
    return {name: number for profiles in rows for name, number in profiles.items()}


def _useless_routers(connection: Connection, keep: int) -> list[int]:
    """Routers with files that neither serve nor could: of another bundle, or of generations given up."""
    use, back = _use(connection), _way_back(connection, keep).router
    columns = tables.generations.c
    ready = {
        (row.name, row.number)
        for row in connection.execute(select(columns.name, columns.number).where(columns.state == "ready"))
    }
    behind = (
        use.revision is not None
        and use.revision < connection.execute(select(tables.registry.c.revision)).scalar_one()
    )
    found = []
    for row in connection.execute(select(tables.routers)):
        usable = row.number == back or (row.build_id == use.build and set(row.profiles.items()) <= ready)
        # A replica that is behind may be about to load it.
        if row.files and row.number not in use.routers and not usable and not behind:
            found.append(row.number)
    return found


def _useless_bundles(connection: Connection, keep: int) -> list[str]:
    used = _use(connection).builds | {_way_back(connection, keep).build}
    rows = connection.execute(select(tables.bundles).where(tables.bundles.c.state == "superseded"))
    return [row.build_id for row in rows if (row.files or row.way_back) and row.build_id not in used]


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
