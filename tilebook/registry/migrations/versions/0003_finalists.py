"""Finalists: the evidence of verdicts, one free-form JSON object before, becomes rows and columns.

Rows that no reader could read are left behind: their digest is wrong, or their evidence is not what a tuner writes.
"""

import logging

import sqlalchemy as sa
from alembic import op

from tilebook.registry import legacy
from tilebook.registry.models import UtcDateTime
from tilebook.registry.texts import Written, columns, finalist_columns

revision = "0003"
down_revision = "0002"

log = logging.getLogger("tilebook.registry")

_PARTNERS = ("problem", "device", "environment", "kernel")


def upgrade() -> None:
    connection = op.get_bind()
    verdicts = [legacy.verdict_or_none(row) for row in connection.execute(sa.text(legacy.ROWS))]
    ids = connection.execute(sa.text(legacy.IDS)).all()
    op.drop_table("verdict")
    verdict, finalist = _create_verdict(), _create_finalist()
    lost = 0
    for number, (found, partners) in enumerate(zip(verdicts, ids, strict=True), start=1):
        if found is None:
            lost += 1
            continue
        keys = dict(zip((f"{partner}_id" for partner in _PARTNERS), partners, strict=True))
        written = Written(found)
        op.bulk_insert(verdict, [{"id": number, **keys, **columns(written)}])
        ranked = enumerate(written.finalists)
        rows = [{"verdict_id": number, **finalist_columns(values, place)} for place, values in ranked]
        op.bulk_insert(finalist, rows)
    if connection.dialect.name == "postgresql":
        connection.execute(
            sa.text("SELECT setval(pg_get_serial_sequence('verdict', 'id'), :top)"), {"top": len(ids) + 1}
        )
    if lost:
        log.warning("%d damaged verdicts were left behind by the upgrade", lost)


def _create_verdict() -> sa.Table:
    return op.create_table(
        "verdict",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("served", sa.String(64), nullable=False),
        *(
            sa.Column(
                f"{partner}_id",
                sa.Integer,
                sa.ForeignKey(f"{partner}.id", name=f"fk_verdict_{partner}_id"),
                nullable=False,
            )
            for partner in _PARTNERS
        ),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("mode", sa.String(16), nullable=False),
        sa.Column("default_time_ms", sa.Double, nullable=True),
        sa.Column("speedup", sa.Double, nullable=True),
        sa.Column("speedup_low", sa.Double, nullable=True),
        sa.Column("speedup_high", sa.Double, nullable=True),
        sa.Column("sources", sa.Text, nullable=False),
        sa.Column("origin", sa.String(64), nullable=False),
        sa.Column("trusted", sa.Boolean, nullable=False),
        sa.Column("created_at", UtcDateTime, nullable=False),
        sa.Column("notes", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_verdict"),
        sa.UniqueConstraint("problem_id", "device_id", "kernel_id", name="uq_verdict_problem_id_device_id_kernel_id"),
        sa.Index("ix_verdict_device_id_kernel_id", "device_id", "kernel_id"),
    )


def _create_finalist() -> sa.Table:
    return op.create_table(
        "finalist",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("verdict_id", sa.Integer, sa.ForeignKey("verdict.id", name="fk_finalist_verdict_id"), nullable=False),
        sa.Column("place", sa.Integer, nullable=False),
        sa.Column("implementation", sa.String(64), nullable=False),
        sa.Column("config", sa.Text, nullable=False),
        sa.Column("time_ms", sa.Double, nullable=True),
        sa.Column("code", sa.String(64), nullable=False),
        sa.Column("predicted_ms", sa.Double, nullable=True),
        sa.Column("is_default", sa.Boolean, nullable=False),
        sa.Column("speedup", sa.Double, nullable=True),
        sa.Column("speedup_low", sa.Double, nullable=True),
        sa.Column("speedup_high", sa.Double, nullable=True),
        sa.Column("samples_ms", sa.Text, nullable=False),
        sa.Column("again", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_finalist"),
        sa.UniqueConstraint("verdict_id", "place", name="uq_finalist_verdict_id_place"),
    )
