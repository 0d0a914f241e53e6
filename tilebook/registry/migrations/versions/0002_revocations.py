"""Revocations."""

import sqlalchemy as sa
from alembic import op

from tilebook.registry.models import UtcDateTime

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "revocation",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("scope", sa.String(64), nullable=False),
        sa.Column("op", sa.String(64), nullable=False),
        sa.Column("implementation", sa.String(64), nullable=False),
        sa.Column("kernel", sa.String(64), nullable=True),
        sa.Column("arch", sa.String(64), nullable=True),
        sa.Column("triton", sa.String(256), nullable=True),
        sa.Column("config", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("origin", sa.String(64), nullable=False),
        sa.Column("trusted", sa.Boolean, nullable=False),
        sa.Column("created_at", UtcDateTime, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_revocation"),
        sa.UniqueConstraint("scope", name="uq_revocation_scope"),
    )
