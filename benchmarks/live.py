"""The server without HTTP: engine thread and event loop in this process, tokens with the times of their arrival.

Only for sections in a process of their own: `open_runtime` sets the calling thread to one torch thread.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from experts.bundle import Bundle
from service.core import Failed, GenerationRequest, TextDelta
from service.runtime import Runtime, open_runtime
from service.serve import runtime_config
from service.settings import Settings


@dataclass(slots=True)
class Stream:
    """One answer: when each of its tokens arrived on the event loop, in seconds of `perf_counter`."""

    arrivals: list[float] = field(default_factory=list)

    def gaps(self, begin: float = 0.0, end: float = float("inf")) -> list[float]:
        """Seconds between two tokens, of those whose second came in [begin, end)."""
        return [b - a for a, b in pairwise(self.arrivals) if begin <= b < end]


def open_live(path: Path) -> Runtime:
    """The runtime of a bundle with the server's defaults."""
    return open_runtime(Bundle.open(path), runtime_config(Settings()))


async def follow(runtime: Runtime, request: GenerationRequest, stream: Stream) -> Stream:
    """Generate, noting arrivals in `stream`.

    Raises:
        TwinserveError: it failed.
    """
    async for event in runtime.submit(request):
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, TextDelta) and event.token_ids:
            stream.arrivals.append(time.perf_counter())
    return stream


async def together(runtime: Runtime, requests: Sequence[GenerationRequest]) -> list[Stream]:
    """All requests at once."""
    return list(await asyncio.gather(*(follow(runtime, request, Stream()) for request in requests)))
