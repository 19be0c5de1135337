"""The first version of the catalogue."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make all tables, and the one row that writers wait for."""
    op.create_table(
        "bundles",
        sa.Column("build_id", sa.String(64), primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("manifest", sa.Text, nullable=False),
        sa.Column("files", sa.JSON, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("state IN ('staged', 'active', 'superseded', 'failed')", name="state"),
    )
    op.create_table(
        "routers",
        sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("build_id", sa.String(64), sa.ForeignKey("bundles.build_id"), nullable=False),
        sa.Column("profiles", sa.JSON, nullable=False),
        sa.Column("files", sa.JSON, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_table(
        "registry",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.Column("build_id", sa.String(64), sa.ForeignKey("bundles.build_id")),
        sa.Column("router", sa.BigInteger, sa.ForeignKey("routers.number")),
        sa.CheckConstraint("id = 1", name="one_row"),
    )
    op.create_table(
        "experts",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("generation", sa.BigInteger),
        sa.Column("last", sa.BigInteger, nullable=False),
        sa.Column("pinned", sa.Boolean, nullable=False),
        sa.Column("trial", sa.JSON),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("state IN ('active', 'disabled', 'retired')", name="state"),
    )
    op.create_table(
        "generations",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("build_id", sa.String(64), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("files", sa.JSON, nullable=False),
        sa.Column("source", sa.JSON),
        sa.Column("compression", sa.JSON),
        sa.Column("summary", sa.JSON),
        sa.Column("profile", sa.JSON),
        sa.Column("prompts", sa.JSON),
        sa.Column("origin", sa.JSON, nullable=False),
        sa.Column("report", sa.JSON, nullable=False),
        sa.Column("job", sa.String(64)),
        sa.Column("left_at", sa.BigInteger),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["name"], ["experts.name"]),
        sa.ForeignKeyConstraint(["build_id"], ["bundles.build_id"]),
        sa.CheckConstraint("state IN ('registering', 'ready', 'failed', 'collected')", name="state"),
    )
    op.create_table(
        "jobs",
        sa.Column("turn", sa.BigInteger, nullable=False, unique=True),
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("slot", sa.Integer, unique=True),
        sa.Column("request", sa.JSON, nullable=False),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("replaces", sa.Boolean, nullable=False),
        sa.Column("expected", sa.BigInteger),
        sa.Column("actor", sa.Text, nullable=False),
        sa.Column("address", sa.Text, nullable=False),
        sa.Column("name", sa.String(64)),
        sa.Column("generation", sa.BigInteger),
        sa.Column("idempotency_key", sa.Text),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("owner", sa.Text),
        sa.Column("cancelling", sa.Boolean, nullable=False),
        sa.Column("progress", sa.JSON, nullable=False),
        sa.Column("failure", sa.JSON),
        sa.Column("result", sa.JSON, nullable=False),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False),
        sa.Column("started", sa.DateTime(timezone=True)),
        sa.Column("ended", sa.DateTime(timezone=True)),
        sa.UniqueConstraint("actor", "idempotency_key"),
        sa.CheckConstraint(
            "state IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')", name="state"
        ),
        sa.CheckConstraint("(state = 'running') = (slot IS NOT NULL)", name="runs_in_slot"),
        sa.CheckConstraint("slot = 1", name="one_slot"),
    )
    op.create_table(
        "aliases",
        sa.Column("alias", sa.String(64), primary_key=True),
        sa.Column("name", sa.String(64), sa.ForeignKey("experts.name"), nullable=False),
    )
    op.create_table(
        "replicas",
        sa.Column("id", sa.String(200), primary_key=True),
        sa.Column("beat", sa.BigInteger, nullable=False),
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.Column("build_id", sa.String(64), nullable=False),
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("leases", sa.JSON, nullable=False),
        sa.Column("seen", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_table(
        "pins",
        sa.Column("holder", sa.String(200), primary_key=True),
        sa.Column("sha256", sa.String(64), primary_key=True),
    )
    op.create_table(
        "audit",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("actor", sa.Text, nullable=False),
        sa.Column("address", sa.Text, nullable=False),
        sa.Column("action", sa.String(64), nullable=False),
        sa.Column("target", sa.Text, nullable=False),
        sa.Column("result", sa.Text, nullable=False),
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.Column("detail", sa.JSON, nullable=False),
    )
    op.create_index("ix_jobs_state", "jobs", ["state"])
    op.create_index("ix_jobs_name", "jobs", ["name"])
    op.create_index("ix_audit_target", "audit", ["target"])
    op.execute("INSERT INTO registry (id, revision) VALUES (1, 0)")


def downgrade() -> None:
    """Remove everything."""
    for table in (
        "audit",
        "pins",
        "replicas",
        "aliases",
        "jobs",
        "generations",
        "experts",
        "registry",
        "routers",
        "bundles",
    ):
        op.drop_table(table)
