"""Metrics by which an operator compares generations of an expert, judges trials and sees the router drift.

Part of `Metrics`. A request counts for every expert that has a gate in it. Labels are bounded: only the generations
of an expert that were used last are shown; experts beyond the first ones share ``other`` for both labels.
"""

from collections import OrderedDict
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Histogram

from service.core import ExpertKey, RequestStats, RouteStats

OTHER = "other"

GENERATIONS = 4
"""Of one expert with a label of their own: the current one, one on trial, and those that they replaced."""

_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)
_CONFIDENCE = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
_DISTANCE = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 10.0)
"""0 is the median of the prompts of the fit, 1 their 95th percentile."""
_DIFFERENCE = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)


class GenerationMetrics:
    """Generations, trials and the router; called on the engine's thread.

    Args:
        label: an expert's name as a label: itself while there are few.
    """

    def __init__(self, registry: CollectorRegistry, label: Callable[[str], str]) -> None:
        self._label = label
        self._shown: dict[str, OrderedDict[int, None]] = {}
        which = ("expert", "generation")

        def counter(name: str, text: str, *more: str) -> Counter:
            return Counter(f"twinserve_{name}", text, (*which, *more), registry=registry)

        def histogram(
            name: str, text: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ()
        ) -> Histogram:
            return Histogram(f"twinserve_{name}", text, labels, buckets=buckets, registry=registry)

        self._requests = counter(
            "expert_requests", "Ended sequences with a gate on that generation.", "finished_reason"
        )
        self._tokens = counter("expert_tokens", "Tokens that they generated.")
        self._seconds = histogram("expert_request_seconds", "Their arrival to last token.", _SECONDS, which)
        self._first = histogram("expert_first_token_seconds", "To their first token.", _SECONDS, which)
        self._tried = counter(
            "trial_requests",
            "Routed sequences that a trial took (canary) or looked on (shadow).",
            "kind",
        )
        self._agreements = counter(
            "trial_agreements", "Of a shadow's: the expert that weighs most was the same."
        )
        self._difference = histogram(
            "trial_gate_difference",
            "Mean absolute difference between a shadow's gates and those used.",
            _DIFFERENCE,
            which,
        )
        self._labelled = (
            self._requests,
            self._tokens,
            self._seconds,
            self._first,
            self._tried,
            self._agreements,
            self._difference,
        )
        self._confidence = histogram(
            "router_confidence",
            "The router's largest probability for each routed sequence; in the mean router_fitted_accuracy, "
            "while prompts are like those of its fit.",
            _CONFIDENCE,
        )
        self._distance = histogram(
            "router_distance",
            "How unlike the prompts of the router's fit a routed sequence is: of those half lie below 0, 95 % "
            "below 1.",
            _DISTANCE,
        )

    def on_request(self, stats: RequestStats, reason: str) -> None:
        """Record an ended sequence; `reason` is its finished_reason."""
        for name, number in stats.generations.items():
            which = self._which(name, number)
            self._requests.labels(*which, reason).inc()
            self._tokens.labels(*which).inc(stats.completion_tokens)
            self._seconds.labels(*which).observe(stats.total_seconds)
            if stats.first_token_seconds is not None:
                self._first.labels(*which).observe(stats.first_token_seconds)

    def on_route(self, stats: RouteStats) -> None:
        """Record what the router made of a real request."""
        self._confidence.observe(stats.confidence)
        if stats.distance is not None:
            self._distance.observe(stats.distance)
        if stats.trial is not None:
            self._tried.labels(*self._key(stats.trial), "canary").inc()
        if stats.shadow is not None:
            which = self._key(stats.shadow.key)
            self._tried.labels(*which, "shadow").inc()
            self._agreements.labels(*which).inc(stats.shadow.agree)
            self._difference.labels(*which).observe(stats.shadow.difference)

    def _key(self, key: ExpertKey) -> tuple[str, str]:
        return self._which(key.name, key.generation)

    def _which(self, name: str, number: int) -> tuple[str, str]:
        """The labels of a generation, which is the most recently used one of its expert now."""
        label = self._label(name)
        if label != name:
            return label, OTHER
        shown = self._shown.setdefault(name, OrderedDict())
        shown[number] = None
        shown.move_to_end(number)
        while len(shown) > GENERATIONS:
            oldest, _ = shown.popitem(last=False)
            for metric in self._labelled:
                metric.remove_by_labels({"expert": name, "generation": str(oldest)})
        return name, str(number)
