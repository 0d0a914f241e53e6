"""Who has made a revocation."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("revocation", sa.Column("made", sa.Text, nullable=True))
