"""Alembic's migrations of the catalogue; `env.py` runs them on a connection that is handed to it."""
