import shutil

import pytest

from experts.bundle import Bundle
from tests.fixtures.tiny import TinyFamily, tiny_family


@pytest.fixture(scope="session")
def family(tmp_path_factory) -> TinyFamily:
    """Three LoRA experts on a tiny Llama; not to be changed."""
    return tiny_family(tmp_path_factory.mktemp("family"))


@pytest.fixture
def path(family, tmp_path):
    """A copy of the family's bundle that a test may change."""
    return shutil.copytree(family.bundle, tmp_path / "bundle")


@pytest.fixture
def bundle(path) -> Bundle:
    return Bundle.open(path)
