"""Frozen values that the settings give to grammars."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GrammarOptions:
    """Frozen values that the settings give.

    Attributes:
        max_bytes: of one definition.
        max_seconds: from asking for a compiled constraint to having it.
        remembered: compiled constraints that are kept.
    """

    max_bytes: int = 65536
    max_seconds: float = 5.0
    remembered: int = 32
