"""Ground truth of the classifier: plain transformers on explicitly merged weights, with the right head."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from experts.classification.bundle import ClassifierBundle
from experts.compression import CompressionSpec
from service.classify import Classified, Text
from service.classify.model import ClassifierModel, leading
from service.core import RoutingChoice
from service.errors import RequestFailedError, TwinserveError
from tests.fixtures.classifiers import LABELS, TinyClassifiers, task_text, tiny_classifiers

FULL_RANK = CompressionSpec(energy=1.0, dtype="float32", extras="exact")
GATES: tuple[Mapping[str, float], ...] = (
    {"tone": 1.0},
    {"size": 0.7, "colour": 0.3},
    {"colour": 1.5, "tone": -0.5},
    {"tone": 0.25, "size": 0.5, "colour": 0.25},
    {"size": 0.01},
)


@pytest.fixture(scope="module", params=["bert", "roberta"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyClassifiers:
    return tiny_classifiers(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def model(family: TinyClassifiers) -> ClassifierModel:
    return ClassifierModel(ClassifierBundle.open(family.bundle))


def texts_of(model: ClassifierModel, choices: Sequence[RoutingChoice]) -> list[Text]:
    """One text a choice, of different lengths."""
    made = []
    for number, choice in enumerate(choices):
        text = " ".join(task_text(task, number) for task in list(LABELS)[: 1 + number % 3])
        made.append(Text(tuple(model.tokenizer(text)["input_ids"]), choice))
    return made


def merged(family: TinyClassifiers, gates: Mapping[str, float]) -> torch.nn.Module:
    """The leading expert's own classifier with θ* + Σ g_t·v_t written into its encoder; the head as it was."""
    bundle = ClassifierBundle.open(family.bundle)
    model = AutoModelForSequenceClassification.from_pretrained(
        family.experts[leading(gates)], dtype=torch.float32
    ).eval()
    state = model.state_dict()
    for name in bundle.shared.names:
        weight = bundle.shared.tensor(name).to(torch.float32).clone()
        for expert, gate in gates.items():
            weights = bundle.expert(expert)
            if name in weights.factors:
                weight += gate * weights.factors[name].dense()
            if name in weights.exact:
                weight += gate * weights.exact[name]
        state[f"{model.base_model_prefix}.{name}"] = weight
    model.load_state_dict(state)
    return model


@torch.inference_mode()
def probabilities(model: torch.nn.Module, ids: Sequence[int]) -> Tensor:
    tokens = torch.tensor([list(ids)])
    return torch.softmax(model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[0], 0)


def answered(answers: Sequence[Classified | TwinserveError]) -> list[Classified]:
    return [answer for answer in answers if isinstance(answer, Classified)]


def test_a_mixed_batch_answers_as_merged_weights_and_the_largest_gates_head(family, model):
    texts = texts_of(model, [RoutingChoice(gates=gates) for gates in GATES])
    answers = answered(model.classify(texts))
    assert len(answers) == len(texts)
    for text, answer, gates in zip(texts, answers, GATES, strict=True):
        expected = probabilities(merged(family, gates), text.ids)
        assert answer.expert == leading(gates)
        assert answer.labels == LABELS[leading(gates)]
        torch.testing.assert_close(torch.tensor(answer.probabilities), expected, rtol=1e-4, atol=1e-5)


def test_biases_norms_and_embeddings_are_among_what_is_gated(family):
    weights = ClassifierBundle.open(family.bundle).expert("tone")
    assert any("LayerNorm.weight" in name for name in weights.exact)
    assert any(name.endswith("query.bias") for name in weights.exact)
    assert {"embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight"} <= set(
        weights.factors
    )


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_full_rank_with_gate_one_is_the_classifier_itself(architecture, tmp_path: Path):
    family = tiny_classifiers(tmp_path, architecture, compression=FULL_RANK, router=False)
    model = ClassifierModel(ClassifierBundle.open(family.bundle))
    for name, folder in family.experts.items():
        own = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        for number in range(4):
            ids = tuple(tokenizer(task_text(name, number))["input_ids"])
            [answer] = answered(model.classify([Text(ids, RoutingChoice(gates={name: 1.0}))]))
            torch.testing.assert_close(
                torch.tensor(answer.probabilities), probabilities(own, ids), rtol=1e-4, atol=1e-5
            )


def test_a_text_has_the_same_answer_alone_and_in_company(model):
    choices = [RoutingChoice(gates=gates) for gates in GATES] + [RoutingChoice(), RoutingChoice(top_k=3)]
    texts = texts_of(model, choices)
    together = answered(model.classify(texts))
    for text, answer in zip(texts, together, strict=True):
        [alone] = answered(model.classify([text]))
        assert alone.routing.gates == answer.routing.gates
        torch.testing.assert_close(
            torch.tensor(alone.probabilities), torch.tensor(answer.probabilities), rtol=1e-4, atol=1e-5
        )


def test_the_router_finds_task_and_label_set(model):
    for task in LABELS:
        texts = [
            Text(tuple(model.tokenizer(task_text(task, number))["input_ids"]), RoutingChoice())
            for number in range(40, 52)
        ]
        answers = answered(model.classify(texts))
        assert [answer.expert for answer in answers] == [task] * len(texts)
        assert all(answer.labels == LABELS[task] for answer in answers)
        assert all(answer.routing.router_generation == 1 for answer in answers)


def test_features_in_a_padded_batch_are_those_that_the_router_was_fitted_on(model):
    texts = texts_of(model, [RoutingChoice() for _ in range(7)])
    together = model.gates_of(texts)
    for text, outcome in zip(texts, together, strict=True):
        [alone] = model.gates_of([text])
        assert outcome.scores == pytest.approx(alone.scores, abs=1e-4)


def test_a_threshold_that_nothing_reaches_still_finds_a_head(model):
    [answer] = answered(model.classify(texts_of(model, [RoutingChoice(threshold=1.0)])))
    assert list(answer.routing.gates.values()) == [1.0]


def test_a_text_that_fails_takes_no_other_with_it(model, monkeypatch):
    broken = Text((9999,), RoutingChoice(gates={"tone": 1.0}))
    good = texts_of(model, [RoutingChoice(gates={"size": 1.0}), RoutingChoice()])
    first, failed, last = model.classify([good[0], broken, good[1]])
    assert isinstance(first, Classified)
    assert isinstance(failed, RequestFailedError)
    assert isinstance(last, Classified)


def test_the_shared_encoder_is_left_as_it_was(family, model):
    before = {name: tensor.clone() for name, tensor in model.encoder.model.state_dict().items()}
    model.classify(texts_of(model, [RoutingChoice(gates=gates) for gates in GATES]))
    after = model.encoder.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
