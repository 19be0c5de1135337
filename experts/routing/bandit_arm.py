"""What a bandit is made of: its hyper-parameters, the context that it sees, and the model of one arm. Pure."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from experts.errors import RoutingError

Vector = npt.NDArray[np.float64]

_SOLVE_EVERY = 64
"""Updates of an arm between two exact solutions; forgetting happens there too."""


class BanditSpec(BaseModel):
    """Hyper-parameters.

    Attributes:
        dims: length of the projected features.
        ridge: pull of every arm towards "the router is right"; one rated answer weighs about 1.25.
        gain: log-odds for each unit of residual reward, before the cap.
        caution: standard deviations by which a residual must differ from 0 before it counts.
        cap: largest |adjustment| of an arm's log-odds.
        least: probability that an adjustment starts from where the router's is below: it calls impossible what
            it does not know.
        epsilon: share of requests that may be given to another arm; 0 never explores.
        optimism: residual reward credited to an unknown arm when exploring, in standard deviations.
        flatness: temperature of the draw among arms when exploring.
        clip: largest inverse propensity.
        memory: updates of an arm after which an old one weighs 1/e.
        seed: of the projection.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dims: int = Field(default=64, ge=1, le=256)
    ridge: float = Field(default=0.5, gt=0, allow_inf_nan=False)
    gain: float = Field(default=6.0, ge=0, allow_inf_nan=False)
    caution: float = Field(default=0.75, ge=0, allow_inf_nan=False)
    cap: float = Field(default=6.0, gt=0, le=50)
    least: float = Field(default=0.02, gt=0, lt=1)
    epsilon: float = Field(default=0.0, ge=0, le=0.5)
    optimism: float = Field(default=0.5, ge=0, allow_inf_nan=False)
    flatness: float = Field(default=2.0, gt=0, allow_inf_nan=False)
    clip: float = Field(default=5.0, ge=1, allow_inf_nan=False)
    memory: float = Field(default=1000.0, ge=_SOLVE_EVERY, allow_inf_nan=False)
    seed: int = Field(default=0, ge=0)


@dataclass(frozen=True, slots=True)
class ContextMap:
    """Router features (d,) → context (dims,) of length 1: standardised, then projected at random.

    Attributes:
        mean, std: (d,) of features.
        projection: (dims, d).
    """

    mean: npt.NDArray[np.float32]
    std: npt.NDArray[np.float32]
    projection: npt.NDArray[np.float32]

    @classmethod
    def make(
        cls, mean: npt.NDArray[np.float32], std: npt.NDArray[np.float32], dims: int, seed: int
    ) -> "ContextMap":
        """The projection is Gaussian, which keeps angles up to about 1/√dims (Johnson, Lindenstrauss)."""
        projection = np.random.default_rng(seed).standard_normal((dims, mean.shape[0])) / math.sqrt(dims)
        return cls(mean, std, projection.astype(np.float32))

    def of(self, features: npt.NDArray[np.float32]) -> Vector:
        """The context; what is not finite counts as average: a staged router leaves what it does not read NaN.

        Raises:
            RoutingError: the width is another.
        """
        if features.shape != self.mean.shape:
            raise RoutingError(
                f"features have shape {features.shape}; feedback was set up for {self.mean.shape}"
            )
        scaled = (features - self.mean) / self.std
        projected = np.asarray(self.projection @ np.where(np.isfinite(scaled), scaled, 0), dtype=np.float64)
        length = float(np.linalg.norm(projected))
        if not math.isfinite(length) or length == 0:
            return np.zeros_like(projected)
        return np.asarray(projected / length)


@dataclass(frozen=True, slots=True)
class Arm:
    """What was learnt of one expert. m = dims + 2.

    Attributes:
        gram: (m, m) Σ w·x·xᵀ without the ridge; moment: (m,) Σ w·residual·x.
        inverse: (m, m) of ridge · I + gram; theta: (m,) the ridge solution.
        updates: rated answers that it had a part in; credit: the sum of its parts.
        reward: rewards times parts, summed.
    """

    gram: Vector
    moment: Vector
    inverse: Vector
    theta: Vector
    updates: int = 0
    credit: float = 0.0
    reward: float = 0.0

    @classmethod
    def solved(
        cls, gram: Vector, moment: Vector, ridge: float, updates: int, credit: float, reward: float
    ) -> "Arm":
        """Exactly, from the sums."""
        inverse = np.linalg.inv(gram + ridge * np.eye(len(moment)))
        inverse = (inverse + inverse.T) / 2
        return cls(gram, moment, inverse, inverse @ moment, updates, credit, reward)

    @classmethod
    def fresh(cls, size: int, ridge: float) -> "Arm":
        """Knows nothing: θ = 0."""
        return cls.solved(np.zeros((size, size)), np.zeros(size), ridge, 0, 0.0, 0.0)

    @property
    def mean_reward(self) -> float | None:
        """Mean reward of its answers, by its part in them; None before the first."""
        return self.reward / self.credit if self.credit > 0 else None

    def learned(
        self, x: Vector, residual: float, reward: float, part: float, weight: float, spec: BanditSpec
    ) -> "Arm":
        """With one more rated answer: Sherman-Morrison, and every so often the exact solution.

        Args:
            x: (m,).
            part: of the answer that it made, in (0, 1].
            weight: of the observation: its part times the clipped inverse propensity.
        """
        gram, moment = self.gram + weight * np.outer(x, x), self.moment + weight * residual * x
        totals = (self.updates + 1, self.credit + part, self.reward + reward * part)
        if totals[0] % _SOLVE_EVERY:
            turned = self.inverse @ x
            inverse = self.inverse - np.outer(turned, turned) * (weight / (1 + weight * float(x @ turned)))
            arm = Arm(gram, moment, inverse, inverse @ moment, *totals)
        else:
            fading = (1 - 1 / spec.memory) ** _SOLVE_EVERY
            arm = Arm.solved(gram * fading, moment * fading, spec.ridge, *totals)
        if not bool(np.isfinite(arm.theta).all()):
            raise RoutingError(
                "feedback would make an expert's adjustment NaN or Inf; roll it back or reset it"
            )
        return arm
