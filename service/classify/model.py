"""A batch of texts → labels: route with the shared encoder, then one gated pass, then each text's own head."""

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from experts.classification.bundle import ClassifierBundle
from experts.classification.families import head_inputs, head_logits
from experts.classification.features import check_spec, pad, read_features
from experts.routing import Router, select_gates
from service.classify.encoder import GatedEncoder
from service.classify.words import Classified, Text
from service.core import ExpertKey, Pattern, RoutingChoice, RoutingOutcome
from service.errors import InvalidRequestError, RequestFailedError, TwinserveError

_log = logging.getLogger(__name__)


class ClassifierModel:
    """An opened classifier bundle, ready to answer. Used by one thread.

    Attributes:
        max_tokens: of a text, special tokens included.
        labels: expert → its label set.
    """

    def __init__(self, bundle: ClassifierBundle, device: str = "cpu") -> None:
        """Load everything.

        Raises:
            CorruptBundleError: a file cannot be read.
            ExpertRejectedError: an expert does not fit the encoder.
            RoutingError: the router reads a layer that the encoder lacks.
        """
        self.name = bundle.manifest.name
        self.family = bundle.family
        model = AutoModel.from_pretrained(
            bundle.shared_path,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            add_pooling_layer=self.family.has_pooler,
        )
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            bundle.shared_path, local_files_only=True, trust_remote_code=False
        )
        self.encoder = GatedEncoder(model.to(device).eval())
        self.labels = {name: bundle.entry(name).labels for name in bundle.expert_names()}
        self._keys = {name: self.encoder.add(bundle.expert(name)) for name in self.labels}
        self._heads = {
            name: {key: tensor.to(device) for key, tensor in bundle.head(name).items()}
            for name in self.labels
        }
        self.router: Router | None = bundle.router()
        if self.router is not None:
            check_spec(self.router.spec, int(model.config.num_hidden_layers))
        # RoBERTa counts positions from behind its padding id.
        first = 0 if self.family.has_pooler else int(model.config.pad_token_id) + 1
        self.max_tokens = int(model.config.max_position_embeddings) - first

    def classify(self, texts: Sequence[Text]) -> list[Classified | TwinserveError]:
        """Answer every text; what fails fails alone."""
        try:
            return self._classify(texts)
        except Exception as error:  # noqa: BLE001 - whatever it is, the other texts must not suffer
            if len(texts) == 1:
                _log.exception("a text cannot be classified")
                return [_as_error(error)]
        return [answer for text in texts for answer in self.classify([text])]

    def gates_of(self, texts: Sequence[Text]) -> list[RoutingOutcome]:
        """What each text's gates are, asking the router for those that name none."""
        asking = [index for index, text in enumerate(texts) if text.routing.gates is None]
        routed = iter(self._route([texts[index] for index in asking]) if asking else ())
        return [
            next(routed) if text.routing.gates is None else self._outcome(text.routing.gates)
            for text in texts
        ]

    def _classify(self, texts: Sequence[Text]) -> list[Classified | TwinserveError]:
        outcomes = self.gates_of(texts)
        ids, mask = self._padded(texts)
        outputs = self.encoder.forward(ids, mask, [self._pattern(outcome.gates) for outcome in outcomes])
        inputs = head_inputs(self.family, outputs)
        return [self._answer(inputs[row], outcome) for row, outcome in enumerate(outcomes)]

    def _answer(self, states: Tensor, outcome: RoutingOutcome) -> Classified | TwinserveError:
        expert = leading(outcome.gates)
        logits = head_logits(self.family, self._heads[expert], states[None])[0]
        if not bool(torch.isfinite(logits).all()):
            return RequestFailedError(
                "the classifier gave NaN or Inf for this text; use smaller gates, or rebuild the bundle"
            )
        probabilities = torch.softmax(logits.to(torch.float32), 0).tolist()
        return Classified(expert, self.labels[expert], tuple(probabilities), outcome)

    def _route(self, texts: Sequence[Text]) -> list[RoutingOutcome]:
        router = self.router
        if router is None:
            raise InvalidRequestError(
                "this classifier has no router; name an expert as model, or give gates", param="model"
            )
        ids, mask = self._padded(texts)
        outputs = self.encoder.forward(ids, mask, None, states=True)
        features = read_features(outputs, [len(text.ids) for text in texts], router.spec)
        rows = router.probabilities(features)
        return [self._routed(router, row, text.routing) for row, text in zip(rows, texts, strict=True)]

    def _routed(self, router: Router, row: Tensor, choice: RoutingChoice) -> RoutingOutcome:
        top_k = choice.top_k or router.top_k
        threshold = router.threshold if choice.threshold is None else choice.threshold
        gates = select_gates(row, router.names, top_k, threshold)
        # A label needs a head: where no gate reaches the threshold, the likeliest expert answers.
        gates = gates or {router.names[int(row.argmax())]: 1.0}
        scores = dict(zip(router.names, row.tolist(), strict=True))
        return self._outcome(gates, router.generation, scores)

    def _outcome(
        self,
        gates: Mapping[str, float],
        router_generation: int | None = None,
        scores: Mapping[str, float] | None = None,
    ) -> RoutingOutcome:
        return RoutingOutcome(
            gates=gates,
            pattern=str(self._pattern(gates)),
            mode="factored",
            generations={name: self._keys[name].generation for name in gates},
            router_generation=router_generation,
            confidence=max(scores.values()) if scores else None,
            scores=scores or {},
        )

    def _pattern(self, gates: Mapping[str, float]) -> Pattern:
        named: list[tuple[ExpertKey, float]] = [(self._keys[name], gates[name]) for name in sorted(gates)]
        return Pattern(tuple((key, weight) for key, weight in named if weight))

    def _padded(self, texts: Sequence[Text]) -> tuple[Tensor, Tensor]:
        return pad([text.ids for text in texts], int(self.tokenizer.pad_token_id or 0))


def _as_error(error: Exception) -> TwinserveError:
    if isinstance(error, TwinserveError):
        return error
    return RequestFailedError(f"{type(error).__name__} while classifying: {error}")


def leading(gates: Mapping[str, float]) -> str:
    """The expert whose label set and head answer: the largest gate, of equals the first name."""
    return min(gates, key=lambda name: (-gates[name], name))
