"""What the supervisor needs of the runtime; `service.runtime.Runtime` and its switch fit it."""

from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from experts.bundle import ExpertWeights
from service.core import Event, ExpertKey, GenerationRequest


class Answers(Protocol):
    """The events of one request."""

    def __aiter__(self) -> AsyncIterator[Event]:
        """To the terminal one."""
        ...

    def cancel(self) -> None:
        """Stop it; harmless when it has ended."""
        ...


class Stage(Protocol):
    """The running engine as a place to look at a generation before anybody else gets it."""

    @property
    def tokenizer(self) -> Any:
        """The shared folder's tokenizer."""
        ...

    @property
    def max_context(self) -> int:
        """Tokens of one sequence."""
        ...

    @property
    def alive(self) -> bool:
        """False once its engine has ended, which a restart alone mends."""
        ...

    def check_room(self) -> None:
        """Raise StorageFullError where another bundle could not be served beside the current one."""
        ...

    def submit(self, request: GenerationRequest) -> Answers:
        """Accept a request and return its events."""
        ...

    async def features(self, prompts: Sequence[tuple[int, ...]]) -> npt.NDArray[np.float32]:
        """What the router sees of each prompt, (n, d)."""
        ...

    async def stage(self, expert: ExpertWeights, /) -> None:
        """Have a generation in memory for requests that name it. Raises ExpertRejectedError."""
        ...

    async def unstage(self, key: ExpertKey, /) -> None:
        """Keep it no more for that; one that is published meanwhile stays."""
        ...
