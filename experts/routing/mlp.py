"""Twin-Merging's router: three linear layers with LeakyReLU and a softmax (arXiv 2406.15479, §3.3)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from experts.errors import RoutingError
from experts.routing.examples import check_features, checked_rows, confusion, sample, stack
from experts.routing.features import FeatureSpec
from experts.routing.guard import Guard, GuardConfig, abstained, fitted_guard
from experts.routing.router import CONFIG_NAME, WEIGHTS_NAME
from experts.routing.storage import misfit, read_config, read_tensors, write_router
from experts.routing.training import CONSTANT, Calibration, Layers, Pace, forward, train

PROFILE_LIMIT = 200
"""Most features kept for one expert, so that the router can be refitted when another expert joins."""
PROFILE_VALIDATION = 50
"""Of these, at most so many come from its validation split."""
_LAYERS = 3


class FitRecord(BaseModel):
    """How a router was fitted and how it did on its validation split; part of router.json.

    Attributes:
        confusion: row = true expert, column = chosen expert, counts over validation features.
        nll_uncalibrated, nll: validation loss in nats before and after the temperature.
        pace: a refit goes at the same one; not written where it is constant.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int
    epochs: int
    best_epoch: int
    learning_rate: float
    train_features: int
    validation_features: int
    validation_accuracy: float
    nll_uncalibrated: float
    nll: float
    confusion: tuple[tuple[int, ...], ...]
    pace: Pace = Field(default=CONSTANT, exclude_if=lambda pace: pace == CONSTANT)


class _Config(BaseModel):
    """router.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["mlp"]
    generation: int
    names: tuple[str, ...]
    spec: FeatureSpec
    top_k: int
    threshold: float
    temperature: float
    record: FitRecord
    guard: GuardConfig | None = None


@dataclass(frozen=True, slots=True)
class Profile:
    """Standardised features of one expert's prompts, float16 (n, d), which a refit uses in their place."""

    train: Tensor
    validation: Tensor


@dataclass(frozen=True, slots=True)
class MlpRouter:
    """A fitted router; immutable.

    Attributes:
        mean, std: (d,) float32, of the training features; a feature is standardised before the network.
        layers: three (weight, bias) pairs.
        profiles: expert → kept features.
        guard: abstains for prompts unlike all; None never does.
    """

    kind: ClassVar[str] = "mlp"

    names: tuple[str, ...]
    spec: FeatureSpec
    generation: int
    top_k: int
    threshold: float
    temperature: float
    mean: Tensor
    std: Tensor
    layers: Layers
    profiles: Mapping[str, Profile]
    record: FitRecord
    guard: Guard | None = None

    @classmethod
    def fit(
        cls,
        training: Mapping[str, Tensor],
        validation: Mapping[str, Tensor],
        spec: FeatureSpec,
        *,
        top_k: int = 2,
        threshold: float = 0.05,
        hidden: int = 256,
        epochs: int = 40,
        batch_size: int = 32,
        learning_rate: float = 5e-4,
        seed: int = 0,
        pace: Pace = CONSTANT,
        guard_rate: float | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> "MlpRouter":
        """Fit on expert → features (n, d) float32, with a disjoint split of the same form for validation.

        The same inputs and seed give the same router. `pace` is how its learning rate follows the prompts'
        difficulty; `guard_rate` is the share of held-out prompts that a guard may leave out; None fits no guard.

        Raises:
            RoutingError: an expert lacks features in a split, widths differ, or a feature is not finite.
        """
        names = tuple(sorted(training))
        check_features(training, validation)
        features, labels = stack(training, names)
        held_out, held_out_labels = stack(validation, names)
        mean = features.mean(0)
        # A feature that hardly varies would be blown up to noise.
        std = features.std(0, correction=0).clamp(min=1e-6)
        scaled, scaled_held_out = (features - mean) / std, (held_out - mean) / std
        fitted = train(
            scaled,
            labels,
            scaled_held_out,
            held_out_labels,
            classes=len(names),
            hidden=[hidden] * (_LAYERS - 1),
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            seed=seed,
            pace=pace,
            progress=progress,
        )
        logits = forward(fitted.layers, scaled_held_out)
        calibration = Calibration.of(logits, held_out_labels)
        record = FitRecord(
            seed=seed,
            epochs=epochs,
            best_epoch=fitted.epoch,
            learning_rate=learning_rate,
            train_features=features.shape[0],
            validation_features=held_out.shape[0],
            validation_accuracy=fitted.accuracy,
            nll_uncalibrated=fitted.nll,
            nll=calibration.nll,
            confusion=confusion(logits.argmax(1), held_out_labels, len(names)),
            pace=pace,
        )
        profiles = {
            name: Profile(
                sample((training[name] - mean) / std, PROFILE_LIMIT - PROFILE_VALIDATION),
                sample((validation[name] - mean) / std, PROFILE_VALIDATION),
            )
            for name in names
        }
        guard = fitted_guard(training, validation, spec, guard_rate)
        return cls(
            names,
            spec,
            0,
            top_k,
            threshold,
            calibration.temperature,
            mean,
            std,
            fitted.layers,
            profiles,
            record,
            guard,
        )

    @torch.inference_mode()
    def probabilities(self, features: Tensor) -> Tensor:
        """See `Router.probabilities`."""
        scaled = (checked_rows(features, self.mean.shape[0]) - self.mean) / self.std
        return torch.softmax(forward(self.layers, scaled) / self.temperature, dim=1)

    @torch.inference_mode()
    def abstains(self, features: Tensor) -> Tensor:
        """See `Abstaining.abstains`."""
        return abstained(self.guard, features)

    def without(self, name: str) -> "MlpRouter | None":
        """See `Router.without`: the softmax over the remaining classes, no refit."""
        if name not in self.names:
            return self
        kept = [index for index, other in enumerate(self.names) if other != name]
        if not kept:
            return None
        weight, bias = self.layers[-1]
        confusion = tuple(tuple(self.record.confusion[i][j] for j in kept) for i in kept)
        return replace(
            self,
            names=tuple(self.names[i] for i in kept),
            layers=(*self.layers[:-1], (weight[kept], bias[kept])),
            profiles={other: profile for other, profile in self.profiles.items() if other != name},
            record=self.record.model_copy(update={"confusion": confusion}),
            guard=self.guard.without(name) if self.guard else None,
        )

    def at_generation(self, generation: int) -> "MlpRouter":
        """See `Router.at_generation`."""
        return replace(self, generation=generation)

    def refitted(self, name: str, training: Tensor, validation: Tensor, seed: int) -> "MlpRouter":
        """See `Router.refitted`: a fit from scratch, as the first one, on these features and the others' profiles."""
        profiles = {other: self.profile(other) for other in self.names if other != name}
        router = MlpRouter.fit(
            {other: kept for other, (kept, _) in profiles.items()} | {name: training},
            {other: held_out for other, (_, held_out) in profiles.items()} | {name: validation},
            self.spec,
            top_k=self.top_k,
            threshold=self.threshold,
            hidden=self.layers[0][0].shape[0],
            epochs=self.record.epochs,
            learning_rate=self.record.learning_rate,
            seed=seed,
            pace=self.record.pace,
        )
        # The guard saw all of the others' prompts; their profiles are a part.
        return replace(router, guard=self.guard.joined(name, training, validation) if self.guard else None)

    def describe(self) -> dict[str, Any]:
        """See `Router.describe`."""
        told: dict[str, Any] = {
            "validation_accuracy": self.record.validation_accuracy,
            "temperature": self.temperature,
            "fit": self.record.model_dump(mode="json"),
        }
        return told | ({"guard_rate": self.guard.rate} if self.guard else {})

    def profile(self, name: str) -> tuple[Tensor, Tensor]:
        """Kept training and validation features of an expert, float32 (n, d), in the original scale."""
        kept = self.profiles[name]
        train_features, held_out = (
            part.to(torch.float32) * self.std + self.mean for part in (kept.train, kept.validation)
        )
        return train_features, held_out

    def save(self, folder: Path) -> None:
        """See `Router.save`."""
        write_router(folder, *self.packed())

    def packed(self) -> tuple[BaseModel, dict[str, Tensor]]:
        """See `Packable.packed`."""
        config = _Config(
            kind="mlp",
            generation=self.generation,
            names=self.names,
            spec=self.spec,
            top_k=self.top_k,
            threshold=self.threshold,
            temperature=self.temperature,
            record=self.record,
            guard=self.guard.config if self.guard else None,
        )
        tensors = {"mean": self.mean, "std": self.std}
        for index, (weight, bias) in enumerate(self.layers):
            tensors[f"layers.{index}.weight"] = weight.contiguous()
            tensors[f"layers.{index}.bias"] = bias.contiguous()
        for name, profile in self.profiles.items():
            tensors[f"profiles.{name}.train"] = profile.train
            tensors[f"profiles.{name}.validation"] = profile.validation
        return config, tensors | (self.guard.tensors() if self.guard else {})

    @classmethod
    def load(cls, folder: Path) -> "MlpRouter":
        """Read what `save` wrote.

        Raises:
            RoutingError: a file is missing or malformed, or its tensors do not fit its description.
        """
        config, tensors = read_config(folder, _Config), read_tensors(folder)
        path = folder / WEIGHTS_NAME
        try:
            layers = tuple(
                (tensors[f"layers.{i}.weight"], tensors[f"layers.{i}.bias"]) for i in range(_LAYERS)
            )
            profiles = {
                name: Profile(tensors[f"profiles.{name}.train"], tensors[f"profiles.{name}.validation"])
                for name in config.names
            }
            router = cls(
                config.names,
                config.spec,
                config.generation,
                config.top_k,
                config.threshold,
                config.temperature,
                tensors["mean"],
                tensors["std"],
                layers,
                profiles,
                config.record,
                Guard.read(config.guard, tensors) if config.guard else None,
            )
        except (KeyError, RoutingError) as error:
            raise misfit(folder, error) from error
        router._check_shapes(path)
        return router

    def _check_shapes(self, path: Path) -> None:
        """Raise unless every tensor fits the next and the names."""
        width = self.mean.shape[0] if self.mean.dim() == 1 else -1
        fits = self.std.shape == self.mean.shape
        for weight, bias in self.layers:
            fits = fits and weight.dim() == 2 and weight.shape[1] == width and bias.shape == weight.shape[:1]
            width = weight.shape[0]
        if not fits or width != len(self.names):
            raise RoutingError(f"{path}: tensor shapes do not fit {CONFIG_NAME}; restore the file")
