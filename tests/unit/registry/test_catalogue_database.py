"""What becomes of a catalogue whose database fails: a clear error, nothing lost, and it works again."""

import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import text

from experts.errors import CatalogueError
from experts.registry.catalogue import Catalogue
from experts.registry.catalogue.database import Database
from experts.registry.catalogue.tables import metadata
from experts.registry.records import Progress
from tests.fixtures.postgres import Postgres
from tests.unit.registry.catalogue import ADMIN, adopt, finish, register, submit


@pytest.fixture
def sqlite(tmp_path: Path) -> Path:
    return tmp_path / "catalogue.sqlite"


@pytest.fixture
def killed(postgres: Postgres) -> Iterator[Postgres]:
    """Runs again after the test."""
    yield postgres
    postgres.kill()
    postgres.start()


def open_sqlite(path: Path, *, read_only: bool = False) -> Catalogue:
    return Catalogue.open(f"sqlite:///{path}", read_only=read_only)


def test_migrations_make_the_tables_that_the_program_reads(catalogue_url: str) -> None:
    Catalogue.open(catalogue_url).close()
    database = Database.open(catalogue_url)
    with database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
    database.close()


def test_everything_is_there_when_it_is_opened_again(catalogue_url: str) -> None:
    first = Catalogue.open(catalogue_url)
    adopt(first)
    register(first, "new")
    before = first.snapshot()
    first.close()
    with pytest.raises(CatalogueError, match="closed"):
        first.snapshot()
    second = Catalogue.open(catalogue_url)
    assert second.snapshot() == before
    second.close()


def test_a_catalogue_of_a_newer_program_is_left_alone(catalogue_url: str) -> None:
    Catalogue.open(catalogue_url).close()
    database = Database.open(catalogue_url)
    with database.write() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    database.close()
    with pytest.raises(CatalogueError, match="newer program"):
        Catalogue.open(catalogue_url)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", "cannot be read"),
        ("nonsense", "cannot be read"),
        ("mysql://root@localhost/x", "use sqlite"),
        ("sqlite://", "needs a file"),
        ("sqlite:///:memory:", "needs a file"),
        ("sqlite:////proc/nowhere/catalogue.sqlite", "cannot be made"),
        ("postgresql://someone:geheim@127.0.0.1:1/x", "cannot be used"),
        ("postgresql://someone:geheim@no-such-host.invalid/x", "cannot be used"),
    ],
)
def test_a_url_of_nothing_usable_is_refused_without_its_password(url: str, said: str) -> None:
    with pytest.raises(CatalogueError, match=said) as refused:
        Catalogue.open(url)
    assert "geheim" not in str(refused.value)


def test_a_file_that_is_no_database_is_refused(sqlite: Path) -> None:
    sqlite.write_bytes(b"this is a text, and a long one at that " * 100)
    with pytest.raises(CatalogueError, match="not a database"):
        open_sqlite(sqlite)


def test_sqlite_keeps_every_commit_through_a_power_failure(sqlite: Path) -> None:
    catalogue = open_sqlite(sqlite)
    database = Database.open(f"sqlite:///{sqlite}")
    with database.write() as connection:
        found = {
            name: connection.execute(text(f"PRAGMA {name}")).scalar_one()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        }
        assert found == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}
        assert connection.execute(text("PRAGMA busy_timeout")).scalar_one() >= 1000
    database.close()
    catalogue.close()


def test_a_full_disk_refuses_changes_and_loses_nothing(sqlite: Path) -> None:
    catalogue = open_sqlite(sqlite)
    adopt(catalogue)
    before = catalogue.snapshot()
    engine = catalogue._database._engine  # The limit is one of the connection's.
    with engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")
    with pytest.raises(CatalogueError, match="full"):
        catalogue.submit("register", {"path": "x" * 1_000_000}, ADMIN, name="big", limit=9)
    assert catalogue.snapshot() == before
    engine.dispose()
    assert register(catalogue, "new").state == "succeeded"
    catalogue.close()


def test_a_writer_that_waits_too_long_is_told_so_and_readers_do_not_wait(
    sqlite: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experts.registry.catalogue.database._STATEMENT_SECONDS", 0.2)
    catalogue = open_sqlite(sqlite)
    adopt(catalogue)
    other = sqlite3.connect(sqlite, isolation_level=None)
    other.execute("PRAGMA busy_timeout=10000")
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(CatalogueError, match="locked"):
        submit(catalogue, "new")
    assert catalogue.revision() == 1
    other.execute("ROLLBACK")
    other.close()
    assert submit(catalogue, "new").generation == 1
    catalogue.close()


def test_what_is_opened_for_reading_answers_and_changes_nothing(catalogue_url: str) -> None:
    writer = Catalogue.open(catalogue_url)
    adopt(writer)
    reader = Catalogue.open(catalogue_url, read_only=True)
    assert (writer.writable, reader.writable) == (True, False)
    register(writer, "new")
    assert reader.snapshot() == writer.snapshot()
    adopt(reader)
    for change in (
        lambda: submit(reader, "other"),
        lambda: reader.record(ADMIN, "retire", "a", "refused", {}),
        lambda: reader.pin_blobs("holder", []),
        lambda: reader.progress("job", 1, Progress()),
    ):
        with pytest.raises(CatalogueError, match="reading only"):
            change()
    stop = threading.Event()
    assert next(iter(reader.watch(stop, 0.01))) == writer.revision()
    reader.close()
    writer.close()


def test_nothing_is_made_where_only_reading_was_asked_for(sqlite: Path) -> None:
    with pytest.raises(CatalogueError, match="not there"):
        open_sqlite(sqlite, read_only=True)
    assert not sqlite.exists()


_AS_ANOTHER = """
import os, sys, tempfile
from experts.registry.catalogue import Catalogue
from experts.errors import CatalogueError
from tests.unit.registry.catalogue import submit

# Whoever runs this may not be able to read Python's own modules later.
with tempfile.TemporaryDirectory() as scratch:
    Catalogue.open(f"sqlite:///{scratch}/catalogue.sqlite").close()
os.setgid(65534)
os.setuid(65534)
catalogue = Catalogue.open(sys.argv[1])
assert not catalogue.writable
print(catalogue.revision(), *sorted(catalogue.snapshot().experts))
try:
    submit(catalogue, "new")
except CatalogueError as error:
    assert "reading only" in str(error), error
    print("refused")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody who may not write")
@pytest.mark.parametrize("left", ["closed", "open"])
def test_a_folder_that_may_not_be_written_is_served_from(tmp_path: Path, left: str) -> None:
    folder = Path("/tmp") / f"twinserve-{os.getpid()}-{tmp_path.name}"
    folder.mkdir(mode=0o755)
    try:
        catalogue = open_sqlite(folder / "catalogue.sqlite")
        adopt(catalogue)
        if left == "closed":
            catalogue.close()
        run = subprocess.run(
            [sys.executable, "-c", _AS_ANOTHER, f"sqlite:///{folder}/catalogue.sqlite"],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=Path(__file__).parents[3],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        )
        assert run.stdout.split() == ["1", "a", "b", "refused"], run.stderr
        catalogue.close()
    finally:
        shutil.rmtree(folder)


def test_postgresql_is_killed_and_works_again_after_its_restart(killed: Postgres) -> None:
    catalogue = Catalogue.open(killed.database())
    adopt(catalogue)
    register(catalogue, "new")
    before = catalogue.snapshot()
    job = submit(catalogue, "a")
    killed.kill()
    for change in (
        catalogue.revision,
        lambda: submit(catalogue, "b"),
        lambda: catalogue.claim("replica"),
        lambda: catalogue.progress(job.id, 1, Progress()),
    ):
        with pytest.raises(CatalogueError, match="cannot be used"):
            change()
    killed.start()
    assert catalogue.revision() == before.revision + 1  # type: ignore[union-attr]
    assert catalogue.job(job.id) == job
    assert finish(catalogue).state == "succeeded"
    assert catalogue.snapshot().experts.keys() == {"a", "b", "new"}  # type: ignore[union-attr]
    catalogue.close()


def test_what_was_acknowledged_before_a_kill_is_there_after_it(killed: Postgres) -> None:
    catalogue = Catalogue.open(killed.database())
    adopt(catalogue)
    acknowledged: list[str] = []
    enough = threading.Event()

    def write() -> None:
        for index in range(100_000):
            try:
                register(catalogue, f"n{index}", profiled=False)
            except CatalogueError:
                return
            acknowledged.append(f"n{index}")
            if len(acknowledged) >= 5:
                enough.set()

    for _ in range(3):
        acknowledged.clear()
        enough.clear()
        writer = threading.Thread(target=write)
        writer.start()
        assert enough.wait(60)
        killed.kill()
        writer.join(60)
        killed.start()
        shot = catalogue.snapshot()
        assert shot is not None
        assert set(acknowledged) <= set(shot.experts)
        revisions = {entry.revision for entry in catalogue.audit(limit=10_000)}
        assert revisions == set(range(1, shot.revision + 1))
        # What was under way is what the next server gives back.
        for job in catalogue.requeue("replica", 9) + catalogue.jobs(state="queued"):
            if catalogue.job(job.id).state == "queued":
                catalogue.cancel(job.id, ADMIN)
    catalogue.close()


def test_a_watcher_outlives_its_database(killed: Postgres) -> None:
    catalogue = Catalogue.open(killed.database())
    adopt(catalogue)
    stop, heard = threading.Event(), threading.Condition()
    seen: list[int] = []

    def watch() -> None:
        for revision in catalogue.watch(stop, 0.05):
            with heard:
                seen.append(revision)
                heard.notify_all()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with heard:
            assert heard.wait_for(lambda: seen == [1], 20)
        killed.kill()
        killed.start()
        submit(catalogue, "new")
        with heard:
            assert heard.wait_for(lambda: seen[-1] == 2, 20)
    finally:
        stop.set()
        watcher.join(20)
    assert not watcher.is_alive()
    catalogue.close()
