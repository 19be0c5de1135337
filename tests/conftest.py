"""Settings of the whole test suite."""

from hypothesis import settings

pytest_plugins = ["tests.fixtures.postgres"]

# Time limits belong to pytest-timeout: a loaded machine must not fail a property.
settings.register_profile("twinserve", deadline=None)
settings.load_profile("twinserve")
