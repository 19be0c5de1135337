"""What the registrar needs of the runtime; `service.runtime.RuntimeSwitch` fits it."""

from collections.abc import Sequence
from typing import Protocol

from experts.bundle import ExpertWeights
from service.core import ExpertKey, ExpertStatus
from service.engine.change import LiveChange
from service.registrar.work.live import Stage


class LiveExperts(Protocol):
    """The runtime as the registrar sees it."""

    @property
    def bundle_name(self) -> str:
        """By which clients ask for routed answers."""
        ...

    def experts(self) -> Sequence[ExpertStatus]:
        """Every generation in memory, or that can be loaded."""
        ...

    def check_room(self) -> None:
        """Raise StorageFullError where another bundle could not be served beside the current one."""
        ...

    async def apply(self, change: LiveChange, /) -> None:
        """Make a change between two steps, all of it or nothing."""
        ...

    async def stage(self, weights: ExpertWeights, /) -> None:
        """Hold a generation for requests that name it by its number. Raises ExpertRejectedError."""
        ...

    async def unstage(self, key: ExpertKey, /) -> None:
        """Hold it no more for that; one that is current by now stays."""
        ...


class LiveRuntime(LiveExperts, Stage, Protocol):
    """The runtime as follower and supervisor see it together."""
