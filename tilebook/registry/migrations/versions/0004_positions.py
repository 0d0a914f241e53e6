"""Positions: where the problems of the verdicts that may be served lie among others."""

import sqlalchemy as sa
from alembic import op

from tilebook.registry.near import position_columns

revision = "0004"
down_revision = "0003"

_BATCH = 1_000


def upgrade() -> None:
    position = op.create_table(
        "position",
        sa.Column("verdict_id", sa.Integer, sa.ForeignKey("verdict.id", name="fk_position_verdict_id"), nullable=False),
        sa.Column("device_id", sa.Integer, nullable=False),
        sa.Column("kernel_id", sa.Integer, nullable=False),
        sa.Column("form", sa.String(16), nullable=False),
        sa.Column("spot", sa.String(28), nullable=False),
        sa.PrimaryKeyConstraint("verdict_id", name="pk_position"),
    )
    connection, last = op.get_bind(), 0
    query = sa.text(
        "SELECT v.id, v.device_id, v.kernel_id, p.key FROM verdict AS v JOIN problem AS p ON p.id = v.problem_id"
        f" WHERE v.trusted AND v.id > :last ORDER BY v.id LIMIT {_BATCH}"
    )
    while found := connection.execute(query, {"last": last}).all():
        rows = []
        for verdict, device, kernel, problem in found:
            try:
                columns = position_columns(problem)
            except (ValueError, TypeError, RecursionError):  # of a damaged row, which nobody serves
                continue
            rows.append({"verdict_id": verdict, "device_id": device, "kernel_id": kernel, **columns})
        op.bulk_insert(position, rows)
        last = found[-1][0]
    op.create_index("ix_position_device_id_kernel_id_form_spot", "position", ["device_id", "kernel_id", "form", "spot"])
