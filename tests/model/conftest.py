"""Models that every test may read and none may change."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.fixtures.tiny import ARCHITECTURES, Architecture, tiny_model


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Architecture, Path]:
    """Architecture → folder of a tiny model."""
    root = tmp_path_factory.mktemp("models")
    return {name: tiny_model(name, root / name, seed=3) for name in ARCHITECTURES}


@pytest.fixture(scope="session")
def llama(folders) -> Path:
    return folders["llama"]


@pytest.fixture(scope="session")
def plain_llama(llama) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(llama)


@pytest.fixture(params=["on", "off"], ids=["native", "eager"])
def native(request) -> str:
    """Both ways of running the decoder layers."""
    return request.param
