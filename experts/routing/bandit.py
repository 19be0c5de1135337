"""A contextual bandit over a router: rated answers → bounded adjustments of its log-odds. Pure; no server, no files.

Disjoint linear models with ridge and optimism (LinUCB, arXiv 1003.0146), one an arm; the arms are the experts and
the shared expert. What an arm learns is not the reward but what was not foreseen of it:

    residual = reward − (2 · Σ probabilities of the gates − 1)        reward in [-1, 1]
    sure = sign(θ·x) · max(|θ·x| − caution · √(xᵀA⁻¹x), 0)            x as `Bandit.inputs` says
    adjustment of an arm's log-odds = cap · tanh(gain · sure / cap)

The probabilities are the router's; but where an answer was worse than feedback had led to expect, they are what
feedback had made of them: an arm that came up only because a better one was struck out has to go down again.

A router that is right with the confidence it claims therefore leaves nothing to learn, and an arm without feedback
has θ = 0: then the router's own row comes back, bit for bit. Old feedback fades (arXiv 1909.09146), so that an
expert that was replaced is judged anew. Explored answers count by their inverse propensity, clipped.

Everything here is immutable: an update gives a new `Bandit`, so a thread may route with one while another learns.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from experts.errors import RoutingError
from experts.routing.bandit_arm import Arm, BanditSpec, ContextMap, Vector

__all__ = ["SHARED_ARM", "Arm", "Bandit", "BanditSpec", "ContextMap", "Decision"]

SHARED_ARM = ""
"""The arm of the shared expert alone; no expert has that name."""

_SMALLEST = 1e-9
_LEAST_FLOOR = 1e-3


@dataclass(frozen=True, slots=True)
class Decision:
    """One request's routing with feedback; kept until it is rated.

    Attributes:
        context: (dims,) of `ContextMap.of`.
        static: expert → the router's own probability, over those that could be chosen.
        adjusted: the same after feedback; its very values where there is nothing to adjust.
        believed: every arm's share after feedback, the shared expert among them.
        floor: probability that stands for the shared expert: the threshold below which gates are dropped.
        alone: the arm that answers alone; None takes gates from `adjusted` as usual.
        explored: another arm than the best known one.
        propensity: probability that this request came to be served so.
    """

    context: Vector
    static: Mapping[str, float]
    adjusted: Mapping[str, float]
    believed: Mapping[str, float]
    floor: float
    alone: str | None = None
    explored: bool = False
    propensity: float = 1.0


@dataclass(frozen=True, slots=True)
class Bandit:
    """Arms by name; those without feedback are not there.

    Attributes:
        version: grows with every change and is never given twice.
        updates: rated answers that it has learnt from.
    """

    spec: BanditSpec
    version: int = 0
    updates: int = 0
    arms: Mapping[str, Arm] = field(default_factory=dict)

    def inputs(self, context: Vector, probability: float) -> Vector:
        """(dims + 2,): a constant, the arm's own log-odds under the router, and the context."""
        clipped = min(max(probability, _SMALLEST), 1 - _SMALLEST)
        odds = min(max(math.log(clipped / (1 - clipped)) / 8, -1.0), 1.0)
        return np.concatenate(([0.5, 0.5 * odds], context))

    def adjustment(self, name: str, context: Vector, probability: float) -> float:
        """What is added to the arm's log-odds, at most `cap` in size; 0 for an arm without feedback."""
        arm = self.arms.get(name)
        if arm is None:
            return 0.0
        residual = float(arm.theta @ self.inputs(context, probability))
        sure = abs(residual) - self.spec.caution * self._deviation(name, context, probability)
        if sure <= 0:
            return 0.0
        return math.copysign(self.spec.cap * math.tanh(self.spec.gain * sure / self.spec.cap), residual)

    def decide(
        self,
        context: Vector,
        static: Mapping[str, float],
        threshold: float,
        rng: np.random.Generator | None = None,
    ) -> Decision:
        """Route one prompt.

        Args:
            context: (dims,) of `ContextMap.of`.
            static: expert → the router's probability.
            threshold: below which a gate is dropped.
            rng: explores with it; None never does.
        """
        floor = max(threshold, _LEAST_FLOOR)
        prior = {**static, SHARED_ARM: floor}
        added = {name: self.adjustment(name, context, p) for name, p in prior.items()}
        scores = {name: math.log(max(p, self.spec.least)) + added[name] for name, p in prior.items()}
        if not any(added.values()):
            best = max(prior, key=prior.__getitem__)
            decision = Decision(context, static, static, prior, floor)
        else:
            best = max(scores, key=scores.__getitem__)
            adjusted = _spread({name: scores[name] for name in static}, sum(static.values()))
            alone = SHARED_ARM if best == SHARED_ARM else None
            decision = Decision(context, static, adjusted, _spread(scores, 1.0), floor, alone)
        if rng is None or self.spec.epsilon == 0:
            return decision
        return self._explored(decision, prior, scores, best, rng)

    def _explored(
        self,
        decision: Decision,
        prior: Mapping[str, float],
        scores: Mapping[str, float],
        best: str,
        rng: np.random.Generator,
    ) -> Decision:
        """With probability ε the arm is drawn instead, likelier where little is known of a good one."""
        spec = self.spec
        hopes = {
            name: (score + spec.gain * spec.optimism * self._deviation(name, decision.context, prior[name]))
            / spec.flatness
            for name, score in scores.items()
        }
        chances = _spread(hopes, 1.0)
        if rng.random() < spec.epsilon:
            names = list(chances)
            weights = np.array(list(chances.values()))
            drawn = names[int(rng.choice(len(names), p=weights / weights.sum()))]
            if drawn != best:
                return replace(decision, alone=drawn, explored=True, propensity=spec.epsilon * chances[drawn])
        return replace(decision, propensity=1 - spec.epsilon * (1 - chances[best]))

    def _deviation(self, name: str, context: Vector, probability: float) -> float:
        x, arm = self.inputs(context, probability), self.arms.get(name)
        if arm is None:
            return math.sqrt(float(x @ x) / self.spec.ridge)
        return math.sqrt(max(float(x @ arm.inverse @ x), 0.0))

    def learned(self, decision: Decision, gates: Mapping[str, float], reward: float) -> "Bandit":
        """With one more rated answer.

        Args:
            decision: how it was routed.
            gates: what answered, expert → weight; empty is the shared expert. Each has a part by its weight.
            reward: in [-1, 1]; 0 is as good as nothing.

        Raises:
            RoutingError: the reward is out of range, or an adjustment would not be finite.
        """
        if not (math.isfinite(reward) and -1 <= reward <= 1):
            raise RoutingError(f"reward {reward} is outside [-1, 1]")
        total = sum(abs(weight) for weight in gates.values())
        parts = {name: abs(weight) / total for name, weight in gates.items() if weight} or {SHARED_ARM: 1.0}
        prior = {**decision.static, SHARED_ARM: decision.floor}
        foreseen = sum(prior.get(name, 0.0) for name in parts)
        believed = sum(decision.believed.get(name, 0.0) for name in parts)
        if reward < 2 * believed - 1:
            foreseen = max(foreseen, believed)
        expected = 2 * min(foreseen, 1.0) - 1
        weight = min(1 / max(decision.propensity, _SMALLEST), self.spec.clip)
        arms = dict(self.arms)
        for name, part in parts.items():
            x = self.inputs(decision.context, prior.get(name, 0.0))
            arm = arms.get(name) or Arm.fresh(len(x), self.spec.ridge)
            arms[name] = arm.learned(x, reward - expected, reward, part, part * weight, self.spec)
        return replace(self, version=self.version + 1, updates=self.updates + 1, arms=arms)

    def retained(self, names: Collection[str]) -> "Bandit":
        """Without the arms of experts that are gone; the same object where none is."""
        kept = {name: arm for name, arm in self.arms.items() if name == SHARED_ARM or name in names}
        return self if len(kept) == len(self.arms) else replace(self, version=self.version + 1, arms=kept)

    def cleared(self) -> "Bandit":
        """Without any feedback: the static router again, under a new version."""
        return Bandit(self.spec, self.version + 1)

    def restored(self, earlier: "Bandit") -> "Bandit":
        """What an earlier version knew, under a new version and the present hyper-parameters."""
        return replace(self, version=self.version + 1, updates=earlier.updates, arms=earlier.arms)


def _spread(scores: Mapping[str, float], total: float) -> dict[str, float]:
    """Softmax that sums to `total`."""
    highest = max(scores.values(), default=0.0)
    powers = {name: math.exp(score - highest) for name, score in scores.items()}
    whole = sum(powers.values())
    return {name: total * power / whole for name, power in powers.items()}
