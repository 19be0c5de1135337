"""The catalogue's tables, as the newest migration leaves them. JSON is kept as text, which any string survives."""

from datetime import UTC, datetime

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Dialect,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
)


class Moment(TypeDecorator[datetime]):
    """A moment in UTC; SQLite keeps no time zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """To UTC."""
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """With its time zone."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


# SQLite numbers rows by itself in a column of type INTEGER alone.
Serial = BigInteger().with_variant(Integer, "sqlite")

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(referred_table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
    }
)

bundles = Table(
    "bundles",
    metadata,
    Column("build_id", String(64), primary_key=True),
    Column("name", Text, nullable=False),
    Column("manifest", Text, nullable=False),
    Column("files", JSON(none_as_null=True), nullable=False),
    Column("state", String(16), nullable=False),
    # What served when another bundle took its place: {"revision", "experts": {name: number}, "retired": [name],
    # "router"}. Null while it serves, and once it was given up.
    Column("way_back", JSON(none_as_null=True)),
    Column("created", Moment, nullable=False),
    CheckConstraint("state IN ('staged', 'active', 'superseded', 'failed')", name="state"),
)

routers = Table(
    "routers",
    metadata,
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("build_id", String(64), ForeignKey("bundles.build_id"), nullable=False),
    Column("profiles", JSON(none_as_null=True), nullable=False),
    # Empty once they were given up by garbage collection.
    Column("files", JSON(none_as_null=True), nullable=False),
    Column("reason", Text, nullable=False),
    Column("created", Moment, nullable=False),
)

registry = Table(
    "registry",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("revision", BigInteger, nullable=False),
    Column("build_id", String(64), ForeignKey("bundles.build_id")),
    Column("router", BigInteger, ForeignKey("routers.number")),
    CheckConstraint("id = 1", name="one_row"),
)

experts = Table(
    "experts",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("state", String(16), nullable=False),
    Column("generation", BigInteger),
    # The highest number that was ever given out: numbers never repeat, whatever becomes of the rows.
    Column("last", BigInteger, nullable=False),
    Column("pinned", Boolean, nullable=False),
    Column("trial", JSON(none_as_null=True)),
    Column("created", Moment, nullable=False),
    Column("updated", Moment, nullable=False),
    CheckConstraint("state IN ('active', 'disabled', 'retired')", name="state"),
)

generations = Table(
    "generations",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("build_id", String(64), nullable=False),
    Column("state", String(16), nullable=False),
    Column("files", JSON(none_as_null=True), nullable=False),
    Column("source", JSON(none_as_null=True)),
    Column("compression", JSON(none_as_null=True)),
    Column("summary", JSON(none_as_null=True)),
    Column("profile", JSON(none_as_null=True)),
    Column("prompts", JSON(none_as_null=True)),
    Column("origin", JSON(none_as_null=True), nullable=False),
    Column("report", JSON(none_as_null=True), nullable=False),
    Column("job", String(64)),
    # The revision that took it out of service: replicas that are behind may need its files still.
    Column("left_at", BigInteger),
    Column("created", Moment, nullable=False),
    ForeignKeyConstraint(["name"], ["experts.name"]),
    ForeignKeyConstraint(["build_id"], ["bundles.build_id"]),
    CheckConstraint("state IN ('registering', 'ready', 'failed', 'collected')", name="state"),
)

jobs = Table(
    "jobs",
    metadata,
    # Its place in the queue.
    Column("turn", BigInteger, nullable=False, unique=True),
    Column("id", String(64), primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("state", String(16), nullable=False),
    # 1 while it runs. Unique, so that no two run at once whatever happens.
    Column("slot", Integer, unique=True),
    Column("request", JSON(none_as_null=True), nullable=False),
    Column("fingerprint", String(64), nullable=False),
    Column("replaces", Boolean, nullable=False),
    Column("expected", BigInteger),
    Column("actor", Text, nullable=False),
    Column("address", Text, nullable=False),
    Column("name", String(64)),
    Column("generation", BigInteger),
    Column("idempotency_key", Text),
    Column("attempt", Integer, nullable=False),
    # Attempts that died with their process or server; those that were given back in good order do not count.
    Column("deaths", Integer, nullable=False, server_default="0"),
    Column("owner", Text),
    Column("cancelling", Boolean, nullable=False),
    Column("progress", JSON(none_as_null=True), nullable=False),
    Column("failure", JSON(none_as_null=True)),
    Column("result", JSON(none_as_null=True), nullable=False),
    Column("created", Moment, nullable=False),
    Column("started", Moment),
    Column("ended", Moment),
    UniqueConstraint("actor", "idempotency_key"),
    CheckConstraint("state IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')", name="state"),
    CheckConstraint("(state = 'running') = (slot IS NOT NULL)", name="runs_in_slot"),
    CheckConstraint("slot = 1", name="one_slot"),
    Index("ix_jobs_state", "state"),
    Index("ix_jobs_name", "name"),
)

aliases = Table(
    "aliases",
    metadata,
    Column("alias", String(64), primary_key=True),
    Column("name", String(64), ForeignKey("experts.name"), nullable=False),
)

replicas = Table(
    "replicas",
    metadata,
    Column("id", String(200), primary_key=True),
    Column("beat", BigInteger, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("build_id", String(64), nullable=False),
    Column("url", Text, nullable=False),
    Column("leases", JSON(none_as_null=True), nullable=False),
    Column("seen", Moment, nullable=False),
)

pins = Table(
    "pins",
    metadata,
    Column("holder", String(200), primary_key=True),
    Column("sha256", String(64), primary_key=True),
)

audit = Table(
    "audit",
    metadata,
    Column("id", Serial, primary_key=True),
    Column("at", Moment, nullable=False),
    Column("actor", Text, nullable=False),
    Column("address", Text, nullable=False),
    Column("action", String(64), nullable=False),
    Column("target", Text, nullable=False),
    Column("result", Text, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("detail", JSON(none_as_null=True), nullable=False),
    Index("ix_audit_target", "target"),
)
