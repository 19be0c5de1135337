"""Fit the router's network: cross-entropy, Adam, best epoch and temperature on validation. Seeded."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

LEAKY_SLOPE = 0.01
TEMPERATURE_RANGE = (0.25, 16.0)
"""A perfect validation split would drive it to 0 and every confidence to 1; the floor stops that."""

Layers = Sequence[tuple[Tensor, Tensor]]
"""(weight (out, in), bias (out,)) of each linear layer, float32."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How the learning rate follows the difficulty of what is being learnt.

    Attributes:
        kind: "constant" does not; "batch" takes larger steps on batches that are harder than usual, by their loss;
            "focal" lets every prompt count by how badly it is known, (1 − p)^power (arXiv 1708.02002).
        low, high: bounds of the factor on the learning rate, for "batch".
        smoothing: of the usual loss, an exponential moving average, for "batch".
        power: for "focal".
    """

    kind: Literal["constant", "batch", "focal"] = "constant"
    low: float = 0.5
    high: float = 2.0
    smoothing: float = 0.9
    power: float = 2.0

    def factor(self, loss: float, usual: float) -> float:
        """Of the learning rate, for a batch of that loss where `usual` is the average one."""
        if self.kind != "batch":
            return 1.0
        return min(max(loss / max(usual, 1e-12), self.low), self.high)

    def weights(self, logits: Tensor, labels: Tensor) -> Tensor | None:
        """(n,) weights of mean 1 for prompts with logits (n, classes) and labels (n,); None weighs all alike."""
        if self.kind != "focal":
            return None
        known = torch.softmax(logits.detach(), dim=1).gather(1, labels[:, None])[:, 0]
        missing = (1 - known).pow(self.power)
        # Where everything is known nothing is left to prefer; the sum must not vanish.
        return (missing + 1e-6) / (missing + 1e-6).mean()


CONSTANT = Pace()


@dataclass(frozen=True, slots=True)
class Fitted:
    """A trained network and how it did on validation, before calibration."""

    layers: Layers
    epoch: int
    accuracy: float
    nll: float


def forward(layers: Layers, features: Tensor) -> Tensor:
    """Logits (n, classes) of standardised features (n, d)."""
    hidden = features
    for weight, bias in layers[:-1]:
        hidden = functional.leaky_relu(functional.linear(hidden, weight, bias), LEAKY_SLOPE)
    weight, bias = layers[-1]
    return functional.linear(hidden, weight, bias)


def train(
    features: Tensor,
    labels: Tensor,
    validation_features: Tensor,
    validation_labels: Tensor,
    *,
    classes: int,
    hidden: Sequence[int],
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    pace: Pace = CONSTANT,
    progress: Callable[[int, int], None] | None = None,
) -> Fitted:
    """Train on standardised features (n, d) and labels (n,) int64; keep the epoch that is best on validation.

    Best is highest validation accuracy, then lowest validation loss. Classes weigh the same in the loss
    however many prompts each brought, so a larger prompts file does not attract requests.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = _initial(features.shape[1], [*hidden, classes], generator)
    parameters = [tensor for layer in layers for tensor in layer]
    optimiser = torch.optim.Adam(parameters, lr=learning_rate)
    counts = torch.bincount(labels, minlength=classes).clamp(min=1)
    weight = labels.shape[0] / (classes * counts.to(torch.float32))
    best: Fitted | None = None
    usual: float | None = None
    for epoch in range(1, epochs + 1):
        order = torch.randperm(features.shape[0], generator=generator)
        for batch in torch.split(order, batch_size):
            logits = forward(layers, features[batch])
            loss = _loss(logits, labels[batch], weight, pace.weights(logits, labels[batch]))
            if pace.kind == "batch":
                now = float(loss.detach())
                usual = now if usual is None else pace.smoothing * usual + (1 - pace.smoothing) * now
                optimiser.param_groups[0]["lr"] = learning_rate * pace.factor(now, usual)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        with torch.no_grad():
            logits = forward(layers, validation_features)
        accuracy = float((logits.argmax(1) == validation_labels).float().mean())
        nll = float(functional.cross_entropy(logits, validation_labels))
        if best is None or (accuracy, -nll) > (best.accuracy, -best.nll):
            kept = tuple((w.detach().clone(), b.detach().clone()) for w, b in layers)
            best = Fitted(kept, epoch, accuracy, nll)
        if progress is not None:
            progress(epoch, epochs)
    if best is None:
        raise ValueError(f"epochs is {epochs}; at least one is needed")
    return best


@dataclass(frozen=True, slots=True)
class Calibration:
    """How sure of itself a router may be, and how it does on held-out prompts then.

    Attributes:
        accuracy: share of rows whose largest logit is the right one.
        nll: mean loss in nats at the temperature.
    """

    temperature: float
    accuracy: float
    nll: float

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor, unit: float = 1.0) -> "Calibration":
        """Of logits (n, classes) and labels (n,); the search for the temperature is in multiples of `unit`."""
        temperature = unit * calibrate(logits / unit, labels)
        return cls(
            temperature,
            float((logits.argmax(1) == labels).float().mean()),
            float(functional.cross_entropy(logits / temperature, labels)),
        )


def calibrate(logits: Tensor, labels: Tensor) -> float:
    """The temperature that minimises the NLL of softmax(logits / temperature), by golden-section search.

    The NLL has one minimum in log temperature, so the search needs no gradient and cannot diverge.
    """

    def nll(log_temperature: float) -> float:
        return float(functional.cross_entropy(logits / math.exp(log_temperature), labels))

    low, high = (math.log(bound) for bound in TEMPERATURE_RANGE)
    golden = (math.sqrt(5) - 1) / 2
    left, right = high - golden * (high - low), low + golden * (high - low)
    nll_left, nll_right = nll(left), nll(right)
    for _ in range(60):
        if nll_left <= nll_right:
            high, right, nll_right = right, left, nll_left
            left = high - golden * (high - low)
            nll_left = nll(left)
        else:
            low, left, nll_left = left, right, nll_right
            right = low + golden * (high - low)
            nll_right = nll(right)
    return math.exp((low + high) / 2)


def _loss(logits: Tensor, labels: Tensor, weight: Tensor, prompts: Tensor | None) -> Tensor:
    """Mean cross-entropy with a weight for each class, and for each prompt where `prompts` (n,) is given."""
    if prompts is None:
        return functional.cross_entropy(logits, labels, weight=weight)
    losses = functional.cross_entropy(logits, labels, weight=weight, reduction="none")
    return (losses * prompts).sum() / weight[labels].sum()


def _initial(inputs: int, widths: Sequence[int], generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """torch.nn.Linear's own initialisation, but from the given generator."""
    layers = []
    for width in widths:
        bound = 1 / math.sqrt(inputs)
        weight = torch.empty(width, inputs).uniform_(-bound, bound, generator=generator).requires_grad_()
        bias = torch.empty(width).uniform_(-bound, bound, generator=generator).requires_grad_()
        layers.append((weight, bias))
        inputs = width
    return layers
