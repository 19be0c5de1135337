"""Runs migrations on the connection, and in the transaction, of whoever asks for them."""

from alembic import context

from experts.registry.catalogue.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    # SQLite can take back changes of the schema too, once transactions are begun by hand as they are here.
    transactional_ddl=True,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
