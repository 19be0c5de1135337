"""A catalogue of either kind of database."""

from collections.abc import Iterator

import pytest

from experts.registry.catalogue import Catalogue
from tests.unit.registry.catalogue import adopt


@pytest.fixture
def catalogue(catalogue_url: str) -> Iterator[Catalogue]:
    """Filled with a small bundle."""
    opened = Catalogue.open(catalogue_url)
    adopt(opened)
    yield opened
    opened.close()
