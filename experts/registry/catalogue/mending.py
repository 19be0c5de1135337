"""What only the checker of a registry asks and does."""

from collections import defaultdict

from sqlalchemy import select, update

from experts.errors import TransitionError
from experts.registry.catalogue import tables
from experts.registry.catalogue.change import Connected
from experts.registry.records import ENDED, Actor


class Mending(Connected):
    """Beside the other parts of the catalogue; raises CatalogueError as they do."""

    def pins(self) -> dict[str, tuple[str, ...]]:
        """Holder → digests of the blobs that it pinned."""
        found: dict[str, list[str]] = defaultdict(list)
        with self._database.read() as connection:
            for row in connection.execute(select(tables.pins.c.holder, tables.pins.c.sha256)):
                found[row.holder].append(row.sha256)
        return {holder: tuple(digests) for holder, digests in found.items()}

    def abandon(self, name: str, number: int, actor: Actor) -> None:
        """A generation that is registering though no job does it any more has failed.

        Raises:
            RecordNotFoundError: there is no such generation.
            TransitionError: it is not registering, or its job has not ended.
        """
        columns, jobs = tables.generations.c, tables.jobs.c
        with self._change() as change:
            row = change.generation_row(name, number)
            if row.state != "registering":
                raise TransitionError(f"generation {number} of {name!r} is {row.state}")
            live = change.connection.execute(
                select(jobs.id).where(jobs.id == row.job, jobs.state.not_in(sorted(ENDED)))
            ).first()
            if live is not None:
                raise TransitionError(f"generation {number} of {name!r} is being registered by {row.job}")
            change.connection.execute(
                update(tables.generations)
                .where(columns.name == name, columns.number == number)
                .values(state="failed", report={"error": "no job was there to finish it"})
            )
            change.note(actor, "abandon", name, {"generation": number})
