"""A bundle that another one replaced keeps what served then, and can serve again. Attempts that died are
counted apart from those that were given back.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Bundles that were replaced before this version have no way back."""
    op.add_column("bundles", sa.Column("way_back", sa.JSON))
    op.add_column("jobs", sa.Column("deaths", sa.Integer, nullable=False, server_default="0"))
