"""lm-eval over HTTP and lm-eval over transformers, on one task and the same weights: the same figures.

The weights are an expert's, written into a plain model: served they are the shared expert and factors.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

from experts.bundle import Bundle
from tests.api.harness import Served
from tests.contract.conftest import KEY
from tests.fixtures.tiny import TinyFamily
from tests.model.harness import materialised

pytestmark = pytest.mark.filterwarnings("default")  # its own, about its own parts

EXPERT = "beta"
ITEMS = 24
TOLERANCE = 2e-3
"""Of a continuation's summed log-probability: two ways to compute in float32, and JSON's digits."""

TASKS = Path(__file__).parent / "tasks"


@pytest.fixture(scope="module")
def plain(family: TinyFamily, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The expert as an ordinary model folder."""
    folder = tmp_path_factory.mktemp("plain")
    shared = family.bundle / "shared"
    materialised(shared, [(Bundle.open(family.bundle).expert(EXPERT), 1.0)]).save_pretrained(folder)
    AutoTokenizer.from_pretrained(shared).save_pretrained(folder)
    return folder


def evaluate(model: str, arguments: dict[str, Any], task: str) -> dict[str, Any]:
    found = simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=[task],
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
        device="cpu",
    )
    assert found is not None
    return dict(found)


@pytest.fixture(scope="module")
def both(server: Served, plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Evaluates a task over HTTP and over transformers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", KEY)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))

        def run(task: str, **more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
            served = {
                "model": EXPERT,
                "base_url": f"{server.url}/v1/completions",
                "tokenizer": str(plain),
                "tokenizer_backend": "huggingface",
                "max_length": 512,
                "max_retries": 1,
                **more,
            }
            alone = {"pretrained": str(plain), "dtype": "float32", "max_length": 512}
            return (
                evaluate("local-completions", served, task),
                evaluate("hf", alone, task),
            )

        yield run


def responses(found: dict[str, Any], task: str) -> list[Any]:
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    assert len(samples) == ITEMS
    return [sample["resps"] for sample in samples]


def scores(found: dict[str, Any], task: str) -> dict[str, float]:
    return {
        name: value
        for name, value in found["results"][task].items()
        if isinstance(value, float) and "stderr" not in name
    }


@pytest.mark.parametrize("batch", [{"batch_size": 1}, {"batch_size": 8, "num_concurrent": 4}])
def test_the_same_log_probabilities_and_scores_of_choices(
    both: Any, batch: dict[str, int], record_property: Any
) -> None:
    served, alone = both("choices", **batch)
    assert scores(served, "choices") == scores(alone, "choices") != {}
    differences = []
    for ours, theirs in zip(responses(served, "choices"), responses(alone, "choices"), strict=True):
        assert len(ours) == len(theirs) == 3
        for ((value, greedy),), ((expected, expected_greedy),) in zip(ours, theirs, strict=True):
            assert value == pytest.approx(expected, abs=TOLERANCE)
            assert greedy == expected_greedy
            differences.append(abs(value - expected))
    record_property("largest_difference", max(differences))


def test_the_same_words_are_generated(both: Any) -> None:
    served, alone = both("words", batch_size=4)
    assert responses(served, "words") == responses(alone, "words")
    assert scores(served, "words") == scores(alone, "words") != {}


def test_the_same_perplexity(both: Any) -> None:
    served, alone = both("texts", batch_size=4)
    assert scores(served, "texts") == pytest.approx(scores(alone, "texts"), rel=1e-4)
    assert scores(served, "texts")
