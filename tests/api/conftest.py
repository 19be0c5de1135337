from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.api.harness import ADMIN_KEY, Served, serving
from tests.fixtures.tiny import TinyFamily, tiny_family


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> TinyFamily:
    """alpha, beta and gamma over one base; nobody may change its bundle."""
    return tiny_family(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="session")
def experts_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("experts-root")


@pytest.fixture(scope="session")
def server(family: TinyFamily, experts_root: Path) -> Iterator[Served]:
    """A server with default limits and an admin key; experts stay as they are."""
    with serving(family.bundle, admin_key=ADMIN_KEY, experts_root=experts_root) as served:
        yield served


@pytest.fixture(scope="session")
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made
