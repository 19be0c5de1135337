"""The sequences of one HTTP request: admitted together, read as one, cancelled together."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from starlette.requests import Request

from service.api.backend import Backend, Generation
from service.api.errors import ClientGoneError
from service.core import Event, Failed, Finished, GenerationRequest, TextDelta, TokenLogprobs
from service.errors import RequestFailedError, ShuttingDownError, TwinserveError

Piece = tuple[int, TextDelta | Finished]
"""Choice index and what it has to say."""

T = TypeVar("T")


@dataclass(slots=True)
class Completed:
    """One choice, whole."""

    text: list[str] = field(default_factory=list)
    scores: list[TokenLogprobs] = field(default_factory=list)
    end: Finished | None = None


class Batch:
    """Sequences that live and die together; `close` must be called, or `pieces` read to its end."""

    def __init__(self, generations: list[Generation]) -> None:
        self._generations = generations

    @classmethod
    def admit(cls, backend: Backend, requests: Iterable[GenerationRequest]) -> "Batch":
        """Queue all sequences, or none: what one refuses is refused for all.

        Raises:
            TwinserveError: as `Runtime.submit`.
        """
        batch = cls([])
        try:
            for request in requests:
                batch._generations.append(backend.submit(request))
        except BaseException:
            batch.close()
            raise
        return batch

    def close(self) -> None:
        """Cancel whatever still runs; idempotent."""
        # A prompt's first choice last: without it the further ones would start to be routed by themselves.
        for generation in reversed(self._generations):
            generation.cancel()

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """All events but failures, as they come; ends after each choice's `Finished`.

        Raises:
            TwinserveError: the first failure of any choice; the others are cancelled.
        """
        try:
            async for index, event in self._events():
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Finished) and event.reason == "cancelled":
                    # The client is still here, so it was not the client.
                    raise ShuttingDownError(
                        "The server stopped this request because it shuts down; send it again.", retry_after=5
                    )
                yield index, event
        finally:
            self.close()

    async def _events(self) -> AsyncGenerator[tuple[int, Event], None]:
        if len(self._generations) == 1:
            async for event in self._generations[0]:
                yield 0, event
            return
        queue: asyncio.Queue[tuple[int, Event | None]] = asyncio.Queue()

        async def pump(index: int, generation: Generation) -> None:
            try:
                async for event in generation:
                    queue.put_nowait((index, event))
            except TwinserveError as error:
                queue.put_nowait((index, Failed(error)))
            finally:
                queue.put_nowait((index, None))

        pumps = [asyncio.create_task(pump(*item)) for item in enumerate(self._generations)]
        try:
            running = len(pumps)
            while running:
                index, arrived = await queue.get()
                if arrived is None:
                    running -= 1
                else:
                    yield index, arrived
        finally:
            for task in pumps:
                task.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def collect(self) -> list[Completed]:
        """Every choice whole, in order.

        Raises:
            TwinserveError: any choice failed.
        """
        choices = [Completed() for _ in self._generations]
        async for index, event in self.pieces():
            if isinstance(event, TextDelta):
                choices[index].text.append(event.text)
                choices[index].scores += event.logprobs
            else:
                choices[index].end = event
        if any(choice.end is None for choice in choices):
            raise RequestFailedError("The engine ended this request without a result; send it again.")
        return choices


async def disconnected(request: Request) -> None:
    """Return when the client has hung up; the body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client hangs up.

    Raises:
        ClientGoneError: it hung up.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)
