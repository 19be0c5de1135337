"""What the registrar needs of the runtime; `service.runtime.Runtime` fits it."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from experts.bundle import ExpertWeights
from experts.routing import Router
from service.core import ExpertStatus


class LiveExperts(Protocol):
    """The runtime as the registrar sees it."""

    @property
    def tokenizer(self) -> Any:
        """The shared folder's tokenizer."""
        ...

    def experts(self) -> Sequence[ExpertStatus]:
        """Every generation in memory."""
        ...

    async def features(self, prompts: Sequence[tuple[int, ...]]) -> npt.NDArray[np.float32]:
        """What the router sees of each prompt, (n, d)."""
        ...

    async def publish(self, expert: ExpertWeights, router: Router | None) -> None:
        """Serve a generation from the next step on."""
        ...

    async def retire(self, name: str, router: Router | None) -> None:
        """Serve an expert no more; running requests keep it."""
        ...
