"""The sequences of one HTTP request: admitted together, read as one, cancelled together."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from starlette.requests import Request

from service.api.backend import Backend, Generation
from service.api.errors import ClientGoneError
from service.core import Event, Failed, Finished, GenerationRequest, TextDelta, TokenLogprobs
from service.errors import RequestFailedError, ShuttingDownError
from service.record import current

Piece = tuple[int, TextDelta | Finished]
"""Choice index and what it has to say."""

T = TypeVar("T")

_WAITING_PIECES = 64
"""Of several sequences together; more wait each in its own queue, which the runtime bounds."""


@dataclass(slots=True)
class Completed:
    """One choice, whole."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    scores: list[TokenLogprobs] = field(default_factory=list)
    end: Finished | None = None


class Batch:
    """Sequences that live and die together; `close` must be called, or `pieces` read to its end."""

    def __init__(self, generations: list[Generation]) -> None:
        self._generations = generations
        self._record = current()

    @classmethod
    def admit(cls, backend: Backend, requests: Iterable[GenerationRequest]) -> "Batch":
        """Queue all sequences, or none: what one refuses is refused for all.

        Raises:
            TwinserveError: as `Runtime.submit`.
        """
        batch = cls([])
        try:
            for request in requests:
                batch._generations.append(backend.submit(replace(request, origin=batch._record)))
                if batch._record is not None:
                    batch._record.admitted(request)
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
                if self._record is not None:
                    self._record.saw(event)
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
        # Bounded, so that what a slow client has not read yet piles up where it is counted.
        queue: asyncio.Queue[tuple[int, Event | Exception | None]] = asyncio.Queue(_WAITING_PIECES)

        async def pump(index: int, generation: Generation) -> None:
            try:
                async for event in generation:
                    await queue.put((index, event))
            except Exception as error:  # noqa: BLE001 belongs to whoever reads the queue
                await queue.put((index, error))
            else:
                await queue.put((index, None))

        pumps = [asyncio.create_task(pump(*item)) for item in enumerate(self._generations)]
        try:
            running = len(pumps)
            while running:
                index, arrived = await queue.get()
                if arrived is None:
                    running -= 1
                elif isinstance(arrived, Exception):
                    raise arrived
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
                choices[index].token_ids += event.token_ids
                choices[index].scores += event.logprobs
            else:
                choices[index].end = event
        if any(choice.end is None for choice in choices):
            raise RequestFailedError("The engine ended this request without a result; send it again.")
        return choices


async def begun(request: Request, items: AsyncIterator[T], patience: float) -> AsyncIterator[T]:
    """`items`, once the first is there: what fails or is refused until then still has an HTTP status.

    After `patience` seconds they are given as they are, so that a stream can start and say that it waits.

    Raises:
        TwinserveError: the first one is an error.
        ClientGoneError: the client hung up.
    """
    first = asyncio.ensure_future(anext(items))

    async def all_items() -> AsyncGenerator[T, None]:
        yield await first
        async for item in items:
            yield item

    async def wait() -> bool:
        await asyncio.wait({first}, timeout=patience)
        return first.done()

    try:
        if await while_connected(request, wait()):
            first.result()
    except BaseException:
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        raise
    return all_items()


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
