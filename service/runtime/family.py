"""What a runtime is opened from; `experts.bundle.Bundle` fits, and so does what a catalogue says."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from experts.bundle import ExpertWeights
from experts.routing import Router
from service.engine.loader import Generations


class Family(Protocol):
    """A shared expert, the experts around it and their router, as they are at one moment."""

    @property
    def name(self) -> str:
        """By which clients ask for routed answers."""
        ...

    @property
    def shared_path(self) -> Path:
        """The shared expert: a Hugging Face folder with tokenizer and chat template."""
        ...

    def generations(self) -> Mapping[str, int]:
        """Every expert that is to be served, and its current generation."""
        ...

    def expert(self, name: str) -> ExpertWeights:
        """The current generation's tensors. Raises ExpertsError if they cannot be had."""
        ...

    def router(self) -> Router | None:
        """The current router; None if requests must name their experts."""
        ...

    def loader(self) -> Generations:
        """Reads whatever generation is wanted later."""
        ...
