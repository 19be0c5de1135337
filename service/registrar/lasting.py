"""Work that shall go on for as long as the server runs, whatever fault ends it."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

_log = logging.getLogger(__name__)

_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 30.0
"""Before work that failed begins anew; work that went on for longer than this begins with the first pause again."""

Do = Callable[[], Awaitable[None]]


async def lasting(
    work: Do,
    recover: Do | None = None,
    *,
    what: str,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Do work until it returns or is cancelled; where it raises, it begins anew after a pause that grows.

    Args:
        work: what to do.
        recover: puts right at once what work left that failed; tried until it succeeds. None where that is nothing.
        what: that is, for the log.
        clock: monotonic seconds.
        sleep: waits for so many seconds.
    """
    pause = _FIRST_PAUSE_SECONDS
    while True:
        began = clock()
        try:
            return await work()
        except Exception:  # noqa: BLE001 whatever nobody foresaw
            if clock() - began > _LONGEST_PAUSE_SECONDS:
                pause = _FIRST_PAUSE_SECONDS
            _log.exception("%s has failed by a fault; it begins anew in %g s", what, pause)
        while recover is not None and not await _done(recover, what):
            await sleep(pause)
        await sleep(pause)
        pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)


async def _done(recover: Do, what: str) -> bool:
    try:
        await recover()
    except Exception:  # noqa: BLE001 as above
        _log.exception("what %s left cannot be put right; it is tried again", what)
        return False
    return True
