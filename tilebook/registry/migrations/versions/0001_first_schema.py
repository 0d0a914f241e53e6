"""The first schema."""

import sqlalchemy as sa
from alembic import op

from tilebook.registry.models import UtcDateTime

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "device",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("arch", sa.String(64), nullable=False),
        sa.Column("sm_count", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_device"),
        sa.UniqueConstraint("name", "arch", "sm_count", name="uq_device_name_arch_sm_count"),
    )
    op.create_table(
        "environment",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("versions", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_environment"),
        sa.UniqueConstraint("digest", name="uq_environment_digest"),
    )
    op.create_table(
        "kernel",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("op", sa.String(64), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_kernel"),
        sa.UniqueConstraint("op", "digest", name="uq_kernel_op_digest"),
    )
    op.create_table(
        "problem",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("op", sa.String(64), nullable=False),
        sa.Column("key", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_problem"),
        sa.UniqueConstraint("op", "key", name="uq_problem_op_key"),
    )
    op.create_table(
        "trial",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("origin", sa.String(64), nullable=False),
        *_keys("trial", "problem", "device", "environment", "kernel"),
        sa.Column("implementation", sa.String(64), nullable=False),
        sa.Column("config", sa.Text, nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("failure", sa.String(32), nullable=True),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("time_ms", sa.Double, nullable=True),
        sa.Column("samples_ms", sa.Text, nullable=False),
        sa.Column("facts", sa.Text, nullable=False),
        sa.Column("created_at", UtcDateTime, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_trial"),
        sa.UniqueConstraint("sha256", name="uq_trial_sha256"),
    )
    op.create_index("ix_trial_problem_id_device_id_kernel_id", "trial", ["problem_id", "device_id", "kernel_id"])
    op.create_table(
        "verdict",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        *_keys("verdict", "problem", "device", "environment", "kernel"),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("implementation", sa.String(64), nullable=False),
        sa.Column("config", sa.Text, nullable=False),
        sa.Column("time_ms", sa.Double, nullable=True),
        sa.Column("default_time_ms", sa.Double, nullable=True),
        sa.Column("speedup", sa.Double, nullable=True),
        sa.Column("speedup_low", sa.Double, nullable=True),
        sa.Column("speedup_high", sa.Double, nullable=True),
        sa.Column("evidence", sa.Text, nullable=False),
        sa.Column("origin", sa.String(64), nullable=False),
        sa.Column("trusted", sa.Boolean, nullable=False),
        sa.Column("created_at", UtcDateTime, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_verdict"),
        sa.UniqueConstraint("problem_id", "device_id", "kernel_id", name="uq_verdict_problem_id_device_id_kernel_id"),
    )
    op.create_table(
        "miss",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        *_keys("miss", "problem", "device"),
        sa.Column("calls", sa.BigInteger, nullable=False),
        sa.Column("time_ms", sa.Double, nullable=False),
        sa.Column("last_seen", UtcDateTime, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_miss"),
        sa.UniqueConstraint("problem_id", "device_id", name="uq_miss_problem_id_device_id"),
    )


def _keys(table: str, *others: str) -> list[sa.Column[int]]:
    return [
        sa.Column(
            f"{other}_id",
            sa.Integer,
            sa.ForeignKey(f"{other}.id", name=f"fk_{table}_{other}_id"),
            nullable=False,
        )
        for other in others
    ]
