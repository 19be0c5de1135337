import pytest
from transformers import PreTrainedTokenizerBase

from service.grammar import Grammars
from tests.unit.grammar.walking import grammars, tokenizer_in


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return tokenizer_in(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def made(tokenizer: PreTrainedTokenizerBase) -> Grammars:
    """Default options, for tests that only compile."""
    return grammars(tokenizer)
