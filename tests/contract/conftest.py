import os
from collections.abc import Iterator

import pytest

from tests.api.harness import Served, serving
from tests.contract.family import contract_family
from tests.fixtures.tiny import TinyFamily

# Clients must not ask the network for anything; litellm reads this when it is imported.
os.environ.update(
    LITELLM_LOCAL_MODEL_COST_MAP="True",
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    LANGSMITH_TRACING="false",
)

KEY = "key-of-the-contract-tests"


def pytest_configure(config: pytest.Config) -> None:
    """Clients leave connections and event loops to the collector; that is theirs."""
    config.addinivalue_line("filterwarnings", "ignore:unclosed:ResourceWarning")


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> TinyFamily:
    return contract_family(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="session")
def server(family: TinyFamily) -> Iterator[Served]:
    """A server that wants a key, as those that clients are pointed at do."""
    with serving(family.bundle, api_keys=(KEY,)) as served:
        served.http.headers["Authorization"] = f"Bearer {KEY}"
        yield served


@pytest.fixture(scope="session")
def url(server: Served) -> str:
    """What clients are given as their base URL."""
    return f"{server.url}/v1"


@pytest.fixture(scope="session")
def told(server: Served) -> str:
    """The greedy completion of `PROMPT` that every client must come to."""
    answer = server.complete(prompt=PROMPT, model="alpha", max_tokens=12, temperature=0)
    return str(answer["choices"][0]["text"])


@pytest.fixture(scope="session")
def said(server: Served) -> str:
    """The same for a chat."""
    body = {"model": "alpha", "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    answer = server.post("/v1/chat/completions", body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


@pytest.fixture(scope="session")
def unspaced(server: Served) -> dict[str, float]:
    """A `logit_bias` against white space: between the members of an object random weights would write it for ever."""
    tokenizer = server.runtime.tokenizer
    texts = {token: tokenizer.decode([token]) for token in range(tokenizer.vocab_size)}
    return {str(token): -100.0 for token, text in texts.items() if text[:1].isspace()}


PROMPT = "Add 1 and 2."
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
