"""Fit the router's network: cross-entropy, Adam, best epoch and temperature on validation. Seeded."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

LEAKY_SLOPE = 0.01
TEMPERATURE_RANGE = (0.25, 16.0)
"""A perfect validation split would drive it to 0 and every confidence to 1; the floor stops that."""

Layers = Sequence[tuple[Tensor, Tensor]]
"""(weight (out, in), bias (out,)) of each linear layer, float32."""


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
    for epoch in range(1, epochs + 1):
        order = torch.randperm(features.shape[0], generator=generator)
        for batch in torch.split(order, batch_size):
            loss = functional.cross_entropy(forward(layers, features[batch]), labels[batch], weight=weight)
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
