"""What goes in and out: texts with their routing choice, labels with what made them. A leaf."""

from dataclasses import dataclass
from typing import Protocol

from service.core import RoutingChoice, RoutingOutcome


@dataclass(frozen=True, slots=True)
class Text:
    """One text to classify, limits checked.

    Attributes:
        ids: token ids, special tokens included; at least one.
    """

    ids: tuple[int, ...]
    routing: RoutingChoice


@dataclass(frozen=True, slots=True)
class Classified:
    """The answer to one text.

    Attributes:
        expert: whose label set and head it is: that of the largest gate.
        labels: the expert's label set.
        probabilities: one a label, in the same order; they sum to 1.
    """

    expert: str
    labels: tuple[str, ...]
    probabilities: tuple[float, ...]
    routing: RoutingOutcome

    @property
    def best(self) -> int:
        """Index of the likeliest label; the first of equals."""
        return max(range(len(self.labels)), key=lambda index: self.probabilities[index])


class ClassifyRecorder(Protocol):
    """Who wants to know; called on the classifier's thread."""

    def on_classify_batch(self, *, texts: int, tokens: int, routed: int, seconds: float) -> None:
        """One batch is done: its texts, their tokens with padding, and how many of them were routed."""

    def on_classify_text(self, seconds: float, *, failed: bool) -> None:
        """One text was answered, or failed, so long after it came."""
