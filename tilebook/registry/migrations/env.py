"""Alembic's entry point: runs the migrations inside the caller's transaction, on the caller's connection."""

from alembic import context

from tilebook.registry.models import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    version_table=context.config.attributes["version_table"],
    transactional_ddl=True,
)
context.run_migrations()
