"""How a router does on prompts that it never saw: who is mistaken for whom, how sure it is, what it leaves alone."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from experts.errors import RoutingError
from experts.routing import Router, judged

BINS = 10
"""Of equal width, for the calibration error."""
_TIMED = 20


@dataclass(frozen=True, slots=True)
class Shadow:
    """Prompts of one expert that went to another: `share` of all of its own."""

    expert: str
    taken_by: str
    share: float


@dataclass(frozen=True, slots=True)
class RoutingReport:
    """Figures of one router on one set of prompts. Shares and accuracies are in [0, 1].

    Attributes:
        accuracy: mean over the experts of the share whose own expert has the highest probability; abstentions
            do not count, see `routed_right`.
        routed_right: the same, with a prompt that is left to the shared expert counted as wrong.
        by_expert: accuracy of each.
        confusion: row = expert of `names` that the prompt is for, column = expert that it went to, counts.
        shadows: the largest off-diagonal shares, largest first.
        calibration_error: expected calibration error of the highest probability (arXiv 1706.04599).
        false_abstention: share of the experts' own prompts that it abstains from.
        detected: kind of prompt that no expert is for → share that it abstains from.
        milliseconds: to score one prompt's features, median.
    """

    kind: str
    names: tuple[str, ...]
    prompts: int
    accuracy: float
    routed_right: float
    by_expert: Mapping[str, float]
    confusion: tuple[tuple[int, ...], ...]
    shadows: tuple[Shadow, ...]
    calibration_error: float
    false_abstention: float
    detected: Mapping[str, float]
    milliseconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def to_markdown(self) -> str:
        """A table of the experts, and the figures of all below it."""
        taken = {shadow.expert: shadow for shadow in reversed(self.shadows)}
        lines = ["| expert | accuracy | most often mistaken for |", "|---|---|---|"]
        for name in self.names:
            if name in self.by_expert:
                shadow = taken.get(name)
                other = f"{shadow.taken_by} ({100 * shadow.share:.1f} %)" if shadow else ""
                lines.append(f"| {name} | {100 * self.by_expert[name]:.1f} % | {other} |")
        lines += [
            "",
            f"{self.kind}, {self.prompts} prompts: accuracy {100 * self.accuracy:.1f} %, "
            f"calibration error {100 * self.calibration_error:.1f} %, "
            f"false abstention {100 * self.false_abstention:.1f} %, {self.milliseconds:.2f} ms a prompt",
        ]
        lines += [f"abstains from {100 * share:.1f} % of {kind}" for kind, share in self.detected.items()]
        return "\n".join(lines) + "\n"


def routing_report(
    router: Router,
    features: Mapping[str, Tensor],
    foreign: Mapping[str, Tensor] | None = None,
    *,
    shadows: int = 10,
) -> RoutingReport:
    """Measure a router.

    Args:
        router: of any kind.
        features: expert → (n, d) float32 of prompts that the router was neither fitted nor calibrated on.
        foreign: kind of prompt → (n, d) of prompts that no expert is for.
        shadows: at most so many pairs are listed.

    Raises:
        RoutingError: the router does not know an expert, or an expert has no prompts.
    """
    names = router.names
    unknown = sorted(set(features) - set(names))
    if unknown or not features or any(not rows.shape[0] for rows in features.values()):
        raise RoutingError(
            f"give prompts of every expert that is to be measured, among {', '.join(names)}; {unknown} are not"
        )
    rows = torch.cat([features[name] for name in features])
    labels = torch.cat([torch.full((len(each),), names.index(name)) for name, each in features.items()])
    probabilities, silent = judged(router, rows)
    confidence, chosen = probabilities.max(1)
    right = chosen == labels
    confusion = torch.zeros(len(names), len(names), dtype=torch.long)
    confusion.index_put_((labels, chosen), torch.ones_like(labels), accumulate=True)
    by_expert = {name: _share(right[labels == names.index(name)]) for name in features}
    kept = {name: _share((right & ~silent)[labels == names.index(name)]) for name in features}
    return RoutingReport(
        kind=router.kind,
        names=names,
        prompts=rows.shape[0],
        accuracy=sum(by_expert.values()) / len(by_expert),
        routed_right=sum(kept.values()) / len(kept),
        by_expert=by_expert,
        confusion=tuple(tuple(row) for row in confusion.tolist()),
        shadows=_shadows(confusion, names, shadows),
        calibration_error=calibration_error(confidence, right),
        false_abstention=_share(silent),
        detected={kind: _share(judged(router, each)[1]) for kind, each in (foreign or {}).items()},
        milliseconds=_milliseconds(router, rows),
    )


def calibration_error(confidence: Tensor, right: Tensor, bins: int = BINS) -> float:
    """Σ over bins of |accuracy − mean confidence|, weighted by rows, of (n,) confidences and (n,) bool."""
    places = (confidence * bins).long().clamp(0, bins - 1)
    total = 0.0
    for place in sorted(set(places.tolist())):
        inside = places == place
        total += float(inside.float().mean()) * abs(_share(right[inside]) - float(confidence[inside].mean()))
    return total


def _shadows(confusion: Tensor, names: Sequence[str], limit: int) -> tuple[Shadow, ...]:
    """The largest shares off the diagonal."""
    shares = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    pairs = [
        Shadow(names[i], names[j], float(shares[i, j]))
        for i, j in confusion.clone().fill_diagonal_(0).nonzero().tolist()
    ]
    return tuple(sorted(pairs, key=lambda pair: (-pair.share, pair.expert, pair.taken_by))[:limit])


def _milliseconds(router: Router, rows: Tensor) -> float:
    """Median time to score one row, abstention included."""
    found = []
    for index in range(_TIMED):
        row = rows[index % rows.shape[0]][None]
        begin = time.perf_counter()
        judged(router, row)
        found.append(1000 * (time.perf_counter() - begin))
    return median(found)


def _share(hits: Tensor) -> float:
    return float(hits.float().mean())
