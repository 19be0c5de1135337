"""Encoder architectures: how their sequence classifiers read the encoder, and what their head computes.

The functions are transformers' own, written out so that one encoder pass can serve many heads:
`*ForSequenceClassification` of the family, in evaluation mode, gives the same logits.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from experts.errors import CheckpointError

Kind = Literal["pooled-linear", "first-token-dense"]


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture.

    Attributes:
        prefix: of the encoder's parameters inside a sequence classifier.
        kind: "pooled-linear": a linear layer on the encoder's pooler. "first-token-dense": a tanh layer and a
            linear one on the first token, while the encoder has no pooler.
        dense, out: modules of the head; `dense` is empty where there is none.
    """

    prefix: str
    kind: Kind
    dense: str
    out: str

    @property
    def has_pooler(self) -> bool:
        """The pooler belongs to the encoder, so that it is merged and has exclusive vectors."""
        return self.kind == "pooled-linear"

    @property
    def head_names(self) -> tuple[str, ...]:
        """The head's parameters."""
        modules = (self.dense, self.out) if self.dense else (self.out,)
        return tuple(f"{module}.{part}" for module in modules for part in ("weight", "bias"))


_BERT = Family("bert", "pooled-linear", "", "classifier")
_ROBERTA = Family("roberta", "first-token-dense", "classifier.dense", "classifier.out_proj")
FAMILIES: Mapping[str, Family] = {"bert": _BERT, "roberta": _ROBERTA, "xlm-roberta": _ROBERTA}


def family_of(config: Mapping[str, Any], where: object) -> Family:
    """The family of a config.json.

    Raises:
        CheckpointError: an architecture that is not supported.
    """
    model_type = str(config.get("model_type"))
    if model_type not in FAMILIES:
        raise CheckpointError(
            f"{where}: model type {model_type!r} is no supported encoder; use {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def head_inputs(family: Family, outputs: Any) -> Tensor:
    """What the head reads of an encoder's output, (n, hidden)."""
    states: Tensor = outputs.pooler_output if family.has_pooler else outputs.last_hidden_state[:, 0]
    return states


def head_logits(family: Family, head: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
    """(n, hidden) → (n, labels)."""
    if family.dense:
        inputs = torch.tanh(_linear(head, family.dense, inputs))
    return _linear(head, family.out, inputs)


def check_head(family: Family, shapes: Mapping[str, tuple[int, ...]], hidden: int, labels: int) -> str | None:
    """What is wrong with a head's shapes, if anything."""
    expected: dict[str, tuple[int, ...]] = {}
    if family.dense:
        expected |= {f"{family.dense}.weight": (hidden, hidden), f"{family.dense}.bias": (hidden,)}
    expected |= {f"{family.out}.weight": (labels, hidden), f"{family.out}.bias": (labels,)}
    if set(shapes) != set(expected):
        return f"the head has parameters {sorted(shapes)}, expected {sorted(expected)}"
    for name, shape in expected.items():
        if shapes[name] != shape:
            return f"{name} has shape {list(shapes[name])}, expected {list(shape)}"
    return None


def _linear(head: Mapping[str, Tensor], module: str, inputs: Tensor) -> Tensor:
    return functional.linear(inputs, head[f"{module}.weight"], head[f"{module}.bias"])
