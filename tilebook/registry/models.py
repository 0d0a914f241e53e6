"""The registry's tables. Rows are the normalised form of records; `sha256` is the record's, over all it says.

JSON is kept as canonical text, not as a database's JSON type: the digest is over that text, and every backend returns
it byte for byte.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import BigInteger, DateTime, Double, ForeignKey, Index, MetaData, String, Text, UniqueConstraint
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship
from sqlalchemy.types import TypeDecorator, TypeEngine

from tilebook.registry.checks import parse_time, time_text

_NEVER = datetime(1, 1, 1, tzinfo=UTC)


class UtcDateTime(TypeDecorator[datetime]):
    """An aware UTC time: `timestamptz` on PostgreSQL, sortable text with microseconds on SQLite."""

    impl = String(32)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name == "postgresql":
            return dialect.type_descriptor(DateTime(timezone=True))
        return dialect.type_descriptor(String(32))

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> Any:
        return value if value is None or dialect.name == "postgresql" else time_text(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        if value is None or isinstance(value, datetime):
            return value
        try:
            return parse_time(value, "time")
        except ValueError:
            # One damaged row must not end a whole query: its digest cannot match this time, so it is dropped there.
            return _NEVER


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        }
    )


class DeviceRow(Base):
    __tablename__ = "device"
    __table_args__ = (UniqueConstraint("name", "arch", "sm_count"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(128))
    arch: Mapped[str] = mapped_column(String(64))
    sm_count: Mapped[int]


class EnvironmentRow(Base):
    __tablename__ = "environment"

    id: Mapped[int] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(String(64), unique=True)
    versions: Mapped[str] = mapped_column(Text)


class KernelRow(Base):
    __tablename__ = "kernel"
    __table_args__ = (UniqueConstraint("op", "digest"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    op: Mapped[str] = mapped_column(String(64))
    digest: Mapped[str] = mapped_column(String(64))


class ProblemRow(Base):
    __tablename__ = "problem"
    __table_args__ = (UniqueConstraint("op", "key"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    op: Mapped[str] = mapped_column(String(64))
    key: Mapped[str] = mapped_column(Text)


class TrialRow(Base):
    __tablename__ = "trial"
    __table_args__ = (Index(None, "problem_id", "device_id", "kernel_id"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    sha256: Mapped[str] = mapped_column(String(64), unique=True)
    # Who ran it is not part of the record, so the digest leaves it out; no flipped bit turns one value into another.
    origin: Mapped[str] = mapped_column(String(64))
    problem_id: Mapped[int] = mapped_column(ForeignKey("problem.id"))
    device_id: Mapped[int] = mapped_column(ForeignKey("device.id"))
    environment_id: Mapped[int] = mapped_column(ForeignKey("environment.id"))
    kernel_id: Mapped[int] = mapped_column(ForeignKey("kernel.id"))
    implementation: Mapped[str] = mapped_column(String(64))
    config: Mapped[str] = mapped_column(Text)
    status: Mapped[str] = mapped_column(String(16))
    failure: Mapped[str | None] = mapped_column(String(32))
    reason: Mapped[str] = mapped_column(Text)
    time_ms: Mapped[float | None] = mapped_column(Double)
    samples_ms: Mapped[str] = mapped_column(Text)
    facts: Mapped[str] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)

    problem: Mapped[ProblemRow] = relationship()
    device: Mapped[DeviceRow] = relationship()
    environment: Mapped[EnvironmentRow] = relationship()
    kernel: Mapped[KernelRow] = relationship()


class VerdictRow(Base):
    """`served` is a digest of what dispatch reads, without the samples and the notes: see `served.digest`."""

    __tablename__ = "verdict"
    __table_args__ = (
        UniqueConstraint("problem_id", "device_id", "kernel_id"),
        Index(None, "device_id", "kernel_id"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    sha256: Mapped[str] = mapped_column(String(64))
    served: Mapped[str] = mapped_column(String(64))
    problem_id: Mapped[int] = mapped_column(ForeignKey("problem.id"))
    device_id: Mapped[int] = mapped_column(ForeignKey("device.id"))
    environment_id: Mapped[int] = mapped_column(ForeignKey("environment.id"))
    kernel_id: Mapped[int] = mapped_column(ForeignKey("kernel.id"))
    status: Mapped[str] = mapped_column(String(16))
    mode: Mapped[str] = mapped_column(String(16))
    default_time_ms: Mapped[float | None] = mapped_column(Double)
    speedup: Mapped[float | None] = mapped_column(Double)
    speedup_low: Mapped[float | None] = mapped_column(Double)
    speedup_high: Mapped[float | None] = mapped_column(Double)
    sources: Mapped[str] = mapped_column(Text)
    origin: Mapped[str] = mapped_column(String(64))
    trusted: Mapped[bool]
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    notes: Mapped[str] = mapped_column(Text)

    problem: Mapped[ProblemRow] = relationship()
    device: Mapped[DeviceRow] = relationship()
    environment: Mapped[EnvironmentRow] = relationship()
    kernel: Mapped[KernelRow] = relationship()
    finalists: Mapped[list[FinalistRow]] = relationship(order_by="FinalistRow.place", cascade="all, delete-orphan")
    position: Mapped[PositionRow | None] = relationship(cascade="all, delete-orphan")


class PositionRow(Base):
    """Where the problem of a verdict that may be served lies among others: see `near`. Dispatch looks for it here."""

    __tablename__ = "position"
    __table_args__ = (Index(None, "device_id", "kernel_id", "form", "spot"),)

    verdict_id: Mapped[int] = mapped_column(ForeignKey("verdict.id"), primary_key=True)
    device_id: Mapped[int]
    kernel_id: Mapped[int]
    form: Mapped[str] = mapped_column(String(16))
    spot: Mapped[str] = mapped_column(String(28))


class FinalistRow(Base):
    """A candidate of a verdict; `place` 0 is the winner. Samples are JSON: they are read together or not at all."""

    __tablename__ = "finalist"
    __table_args__ = (UniqueConstraint("verdict_id", "place"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    verdict_id: Mapped[int] = mapped_column(ForeignKey("verdict.id"))
    place: Mapped[int]
    implementation: Mapped[str] = mapped_column(String(64))
    config: Mapped[str] = mapped_column(Text)
    time_ms: Mapped[float | None] = mapped_column(Double)
    code: Mapped[str] = mapped_column(String(64))
    predicted_ms: Mapped[float | None] = mapped_column(Double)
    is_default: Mapped[bool]
    speedup: Mapped[float | None] = mapped_column(Double)
    speedup_low: Mapped[float | None] = mapped_column(Double)
    speedup_high: Mapped[float | None] = mapped_column(Double)
    samples_ms: Mapped[str] = mapped_column(Text)
    again: Mapped[str] = mapped_column(Text)


class MissRow(Base):
    __tablename__ = "miss"
    __table_args__ = (UniqueConstraint("problem_id", "device_id"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    sha256: Mapped[str] = mapped_column(String(64))
    problem_id: Mapped[int] = mapped_column(ForeignKey("problem.id"))
    device_id: Mapped[int] = mapped_column(ForeignKey("device.id"))
    calls: Mapped[int] = mapped_column(BigInteger)
    time_ms: Mapped[float] = mapped_column(Double)
    last_seen: Mapped[datetime] = mapped_column(UtcDateTime)

    problem: Mapped[ProblemRow] = relationship()
    device: Mapped[DeviceRow] = relationship()


class RevocationRow(Base):
    """Whole in itself, without a kernel's or a device's row: it may be about kernels that nobody has tuned here."""

    __tablename__ = "revocation"

    id: Mapped[int] = mapped_column(primary_key=True)
    sha256: Mapped[str] = mapped_column(String(64))
    scope: Mapped[str] = mapped_column(String(64), unique=True)
    op: Mapped[str] = mapped_column(String(64))
    implementation: Mapped[str] = mapped_column(String(64))
    kernel: Mapped[str | None] = mapped_column(String(64))
    arch: Mapped[str | None] = mapped_column(String(64))
    triton: Mapped[str | None] = mapped_column(String(256))
    config: Mapped[str] = mapped_column(Text)
    reason: Mapped[str] = mapped_column(Text)
    origin: Mapped[str] = mapped_column(String(64))
    trusted: Mapped[bool]
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    made: Mapped[str | None] = mapped_column(Text)
