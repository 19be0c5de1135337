"""A small catalogue for whatever stands on one."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from experts.registry.catalogue import Catalogue
from tests.unit.registry.catalogue import adopt


@pytest.fixture
def catalogue(tmp_path: Path) -> Iterator[Catalogue]:
    opened = Catalogue.open(f"sqlite:///{tmp_path / 'catalogue.sqlite'}")
    adopt(opened)
    yield opened
    opened.close()
