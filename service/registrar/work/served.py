"""What is served here while a job works: an admin may have another bundle served at any moment."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

from experts.bundle import Bundle
from experts.errors import TransitionError
from experts.registry.reading import GenerationReader


class Served(Protocol):
    """The family that is served now; `service.registrar.family.CatalogueFamily` fits it."""

    bundle: Bundle
    reader: GenerationReader


Steady = Callable[[], AbstractContextManager[None]]
"""`steady` of one bundle."""


@contextlib.contextmanager
def steady(now: Callable[[], Served], build_id: str) -> Iterator[None]:
    """What is asked of the engine inside is that bundle's, or the block raises.

    The catalogue does not tell: it may name the same bundle again before this replica has switched back to it.

    Args:
        now: the family that is served here.
        build_id: the bundle.

    Raises:
        TransitionError: another one was served here at one end of the block, or in between.
    """
    begun = now()
    if begun.bundle.manifest.build_id != build_id:
        raise not_served(build_id)

    def check() -> None:
        # Every switch brings another family, one to the same bundle too.
        if now() is not begun:
            raise not_served(build_id)

    try:
        yield
    except Exception:
        # Another bundle's refusal says nothing of the job.
        check()
        raise
    check()


def not_served(build_id: str) -> TransitionError:
    """A job's bundle was replaced."""
    return TransitionError(f"the bundle {build_id} is not the one that is served any more; try again")
