import errno
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, update
from typer.testing import CliRunner

from experts.bundle_manifest import FileEntry
from experts.errors import BlobError, CatalogueError
from experts.registry.blobs import Blobs
from experts.registry.catalogue import Catalogue, collecting, tables
from experts.registry.records import (
    Actor,
    BundleRecord,
    Generation,
    Job,
    JobFailure,
    Replica,
    RouterGeneration,
    Trial,
)
from experts.registry.verify import Findings, collect_garbage, garbage, verify
from service.cli import build_app
from tests.fixtures.mounts import mounted
from tests.fixtures.object_store import ObjectStoreServer, object_store
from tests.fixtures.postgres import catalogue_url, postgres

__all__ = ["catalogue_url", "object_store", "postgres"]

BUILD = "build-1"
ACTOR = Actor("tester", "192.0.2.1")


class Registry:
    """A catalogue and blobs with two experts; files are a few bytes."""

    def __init__(self, url: str, root: Path, blobs: Blobs) -> None:
        self.url = url
        self.root = root
        self.blobs = blobs
        self.catalogue = Catalogue.open(url)
        first = [self.generation("alpha", 1), self.generation("beta", 1)]
        self.catalogue.adopt(
            BundleRecord(BUILD, "family", "{}"), first, self.router(1, {"alpha": 1, "beta": 1})
        )

    def generation(self, name: str, number: int) -> Generation:
        files = {
            "expert.safetensors": self.blobs.put_bytes(f"weights of {name}@{number}".encode()),
            "expert.json": self.blobs.put_bytes(f"report of {name}@{number}".encode()),
        }
        return Generation(name, number, BUILD, "ready", files)

    def router(self, number: int, profiles: dict[str, int]) -> RouterGeneration:
        files = {"router.safetensors": self.blobs.put_bytes(f"router {number} {profiles}".encode())}
        return RouterGeneration(number, BUILD, profiles, files, "test")

    def submit(self, name: str) -> Job:
        return self.catalogue.submit("register", {"name": name}, ACTOR, name=name, replace=True, limit=9)

    def begin(self, name: str, owner: str = "replica") -> tuple[Job, Generation]:
        """A registration as far as its files are stored."""
        self.submit(name)
        job = self.catalogue.claim(owner)
        assert job is not None
        assert job.generation is not None
        made = replace(self.generation(name, job.generation), job=job.id)
        self.catalogue.pin_blobs(job.id, [entry.sha256 for entry in made.files.values()])
        return job, made

    def register(self, name: str) -> Generation:
        job, made = self.begin(name)
        self.catalogue.publish(job.id, job.attempt, made, None, None)
        return made

    def stored(self, entry: FileEntry) -> Path:
        return self.root / "blobs" / "sha256" / entry.sha256[:2] / entry.sha256

    def sql(self, *statements: Any) -> None:
        """What no caller of the catalogue could do to it."""
        engine = create_engine(self.url.replace("postgresql:", "postgresql+psycopg:"))
        with engine.begin() as connection:
            for statement in statements:
                connection.execute(statement)
        engine.dispose()

    def verify(self, **options: Any) -> Findings:
        return verify(self.catalogue, self.blobs, **{"watch_seconds": 0.01, **options})

    def kinds(self, **options: Any) -> list[str]:
        return [finding.kind for finding in self.verify(**options).found]

    def mends(self, *kinds: str, **options: Any) -> None:
        """Exactly these are found, nothing is touched by looking, and mending once is enough."""
        assert sorted(self.kinds(**options)) == sorted(kinds)
        assert sorted(self.kinds(**options)) == sorted(kinds)
        found = self.verify(repair=True, **options)
        assert sorted(finding.kind for finding in found.found) == sorted(kinds)
        assert [finding for finding in found.found if finding.mended is None] == []
        assert found.clean
        revision = self.catalogue.revision()
        again = self.verify(repair=True, **options)
        assert again.found == ()
        assert self.catalogue.revision() == revision


@pytest.fixture
def registry(catalogue_url: str, tmp_path: Path) -> Iterator[Registry]:
    made = Registry(catalogue_url, tmp_path, Blobs.open(str(tmp_path / "blobs"), tmp_path / "cache"))
    yield made
    made.catalogue.close()


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Registry]:
    blobs = Blobs.open(str(tmp_path / "blobs"), tmp_path / "cache")
    made = Registry(f"sqlite:///{tmp_path}/catalogue.sqlite", tmp_path, blobs)
    yield made
    made.catalogue.close()


def digests(registry: Registry) -> set[str]:
    return {blob.sha256 for blob in registry.blobs.list()}


def test_a_sound_registry_is_clean_and_left_alone(registry: Registry) -> None:
    registry.register("alpha")
    registry.register("gamma")
    before = registry.catalogue.revision(), digests(registry)

    found = registry.verify(repair=True)

    assert found.clean
    assert found.found == ()
    assert found.blobs == 9
    assert found.nbytes == sum(blob.nbytes for blob in registry.blobs.list())
    assert (registry.catalogue.revision(), digests(registry)) == before


def test_an_empty_catalogue_deletes_nothing(catalogue_url: str, tmp_path: Path) -> None:
    blobs = Blobs.open(str(tmp_path / "blobs"), tmp_path / "cache")
    kept = blobs.put_bytes(b"of another catalogue")
    catalogue = Catalogue.open(catalogue_url)

    assert verify(catalogue, blobs, repair=True).found == ()
    assert collect_garbage(catalogue, blobs, 1, ACTOR).blobs == 0
    assert blobs.has(kept.sha256)
    catalogue.close()


@pytest.mark.parametrize("harm", ["gone", "other bytes", "shorter", "a link", "a folder"])
def test_a_harmed_blob_is_found_and_restored_from_the_bundle(
    registry: Registry, tmp_path: Path, harm: str
) -> None:
    made = registry.register("alpha")
    entry = made.files["expert.safetensors"]
    path = registry.stored(entry)
    good = path.read_bytes()
    (tmp_path / "bundle" / "deep").mkdir(parents=True)
    (tmp_path / "bundle" / "deep" / "decoy").write_bytes(b"?" * len(good))
    (tmp_path / "bundle" / "deep" / "file").write_bytes(good)
    path.chmod(0o644)
    if harm == "other bytes":
        path.write_bytes(b"x" * len(good))
    elif harm == "shorter":
        path.write_bytes(good[:-1])
    else:
        path.unlink()
    if harm == "a link":
        path.symlink_to(tmp_path / "bundle" / "deep" / "file")
    elif harm == "a folder":
        path.mkdir()
        path.rmdir()

    kind = "missing_blob" if harm in ("gone", "a folder") else "corrupt_blob"
    (finding,) = registry.verify().found
    assert finding.kind == kind
    assert f"alpha@{made.number}" in finding.problem
    assert registry.kinds(repair=True) == [kind]  # no copy is known, so nothing is mended
    assert registry.catalogue.generation("alpha", made.number).state == "ready"

    registry.mends(kind, folders=[tmp_path / "bundle"])
    assert registry.blobs.path(entry).read_bytes() == good


def test_only_a_deep_check_reads_every_blob(local: Registry) -> None:
    entry = local.register("alpha").files["expert.json"]
    path = local.stored(entry)
    path.chmod(0o644)
    path.write_bytes(b"x" * entry.nbytes)
    assert local.kinds(deep=False) == []
    assert local.kinds() == ["corrupt_blob"]


def test_a_blob_is_restored_from_a_folder_that_was_made_of_it(local: Registry) -> None:
    made = local.register("alpha")
    local.blobs.folder(made.files)
    for entry in made.files.values():
        local.stored(entry).unlink()
    local.mends("missing_blob", "missing_blob")


def test_a_damaged_object_is_restored_from_the_cache(object_store: ObjectStoreServer, tmp_path: Path) -> None:
    bucket = object_store.bucket()
    blobs = Blobs.open(bucket, tmp_path / "cache", object_store.options)
    registry = Registry(f"sqlite:///{tmp_path}/catalogue.sqlite", tmp_path, blobs)
    made = registry.register("alpha")
    entry, other = made.files.values()
    object_store.damage(f"{bucket}/sha256/{entry.sha256[:2]}/{entry.sha256}", b"x" * entry.nbytes)
    blobs._store.delete(other.sha256)  # its copy in the cache goes as well
    orphan = blobs.put_bytes(b"nobody's")

    found = registry.verify(repair=True)

    assert {(finding.kind, finding.mended is not None) for finding in found.found} == {
        ("corrupt_blob", True),
        ("missing_blob", False),
        ("orphan_blob", True),
    }
    blobs.check(entry)
    assert not blobs.has(orphan.sha256)
    registry.catalogue.close()
    blobs.close()


def test_orphans_and_leftovers_are_removed(registry: Registry) -> None:
    orphan = registry.blobs.put_bytes(b"nobody needs me")
    (registry.root / "blobs" / "incoming" / "half").write_bytes(b"hal")
    assert registry.kinds(grace_seconds=3600) == ["leftover"]

    registry.mends("orphan_blob", "leftover")

    assert not registry.blobs.has(orphan.sha256)


def test_garbage_collection_takes_what_killed_writers_left(registry: Registry) -> None:
    half = registry.root / "blobs" / "incoming" / "half"
    half.write_bytes(b"hal")
    collect_garbage(registry.catalogue, registry.blobs, 1, ACTOR, dry_run=True)
    assert half.exists()
    collect_garbage(registry.catalogue, registry.blobs, 1, ACTOR)
    assert not half.exists()
    assert registry.kinds() == []


def test_files_of_a_registration_that_runs_are_no_orphans(registry: Registry) -> None:
    registry.catalogue.beat(Replica("replica", 1, 1, BUILD))
    job, made = registry.begin("alpha")
    beats = threading.Event()
    with _beating(registry, "replica", beats):
        assert registry.kinds(repair=True, watch_seconds=0.3) == []
    registry.catalogue.publish(job.id, job.attempt, made, None, None)
    assert registry.kinds(watch_seconds=0, repair=True) == ["dead_replica"]
    for entry in made.files.values():
        registry.blobs.check(entry)


def test_a_dead_replicas_job_is_queued_again_and_a_live_ones_left_alone(registry: Registry) -> None:
    for each in ("dead", "alive"):
        registry.catalogue.beat(Replica(each, 1, 1, BUILD))
    job, _ = registry.begin("alpha", owner="dead")
    with _beating(registry, "alive", threading.Event()):
        found = registry.verify(repair=True, watch_seconds=0.3)

    # Its half-made files were pinned by the job, which let go of them.
    assert [finding.kind for finding in found.found] == [
        "lost_job",
        "dead_replica",
        "orphan_blob",
        "orphan_blob",
    ]
    assert found.clean
    assert registry.catalogue.job(job.id).state == "queued"
    assert [replica.id for replica in registry.catalogue.replicas()] == ["alive"]
    again = registry.catalogue.claim("alive")
    assert again is not None
    assert (again.id, again.attempt) == (job.id, job.attempt + 1)


def test_a_generation_whose_job_is_over_has_failed(registry: Registry) -> None:
    job, made = registry.begin("alpha")
    registry.catalogue.fail(job.id, job.attempt, JobFailure("x", "y"))
    columns = tables.generations.c
    registry.sql(update(tables.generations).where(columns.number == made.number).values(state="registering"))

    registry.mends("stuck_generation", "orphan_blob", "orphan_blob")

    assert registry.catalogue.generation("alpha", made.number).state == "failed"
    assert registry.register("alpha").number > made.number


def test_pins_of_nobody_are_removed(registry: Registry) -> None:
    job, made = registry.begin("alpha")
    registry.catalogue.fail(job.id, job.attempt, JobFailure("x", "y"))
    pinned = [entry.sha256 for entry in made.files.values()]
    for holder in (job.id, f"{job.id}/router", "job-that-never-was", "adopt-killed"):
        registry.catalogue.pin_blobs(holder, pinned)

    found = registry.verify(repair=True)

    assert [finding.kind for finding in found.found] == ["stale_pin"] * 4 + ["orphan_blob"] * 2
    assert registry.kinds() == []


def test_what_an_upload_holds_is_kept(registry: Registry) -> None:
    entry = registry.blobs.put_bytes(b"uploaded")
    registry.catalogue.pin_blobs("upload-1", [entry.sha256])
    assert registry.kinds(repair=True) == []
    assert collect_garbage(registry.catalogue, registry.blobs, 1, ACTOR).blobs == 0
    registry.catalogue.unpin_blobs("upload-1")
    assert collect_garbage(registry.catalogue, registry.blobs, 1, ACTOR).blobs == 1


def test_an_expert_whose_generation_cannot_serve_goes_back_to_the_newest_that_can(registry: Registry) -> None:
    second = registry.register("alpha").number
    third = registry.register("alpha").number
    columns = tables.generations.c
    registry.sql(update(tables.generations).where(columns.number == third).values(state="failed", files={}))

    registry.mends("active_generation", "orphan_blob", "orphan_blob")

    assert registry.catalogue.expert("alpha").generation == second


def test_an_expert_that_has_no_generation_to_serve_is_disabled(registry: Registry) -> None:
    columns = tables.generations.c
    registry.sql(update(tables.generations).where(columns.name == "beta").values(state="failed", files={}))

    registry.mends("active_generation", "orphan_blob", "orphan_blob")

    assert registry.catalogue.expert("beta").state == "disabled"
    snapshot = registry.catalogue.snapshot()
    assert snapshot is not None
    assert list(snapshot.experts) == ["alpha"]


def test_a_trial_of_a_generation_that_cannot_serve_is_ended(registry: Registry) -> None:
    job, made = registry.begin("alpha")
    registry.catalogue.publish(
        job.id, job.attempt, made, None, None, trial=Trial("alpha", made.number, "canary", 5.0)
    )
    columns = tables.generations.c
    registry.sql(
        update(tables.generations).where(columns.number == made.number).values(state="failed", files={})
    )

    registry.mends("trial", "orphan_blob", "orphan_blob")

    assert registry.catalogue.expert("alpha").trial is None


def test_an_alias_of_a_name_that_is_gone_is_removed(registry: Registry) -> None:
    registry.catalogue.set_alias("other", "beta", ACTOR)
    registry.sql(update(tables.experts).where(tables.experts.c.name == "beta").values(state="retired"))

    registry.mends("alias")

    assert registry.catalogue.aliases() == {}


def test_a_router_that_knows_what_never_was_is_told(registry: Registry) -> None:
    registry.sql(update(tables.routers).values(profiles={"alpha": 1, "beta": 77}))
    found = registry.verify(repair=True)
    assert [(finding.kind, finding.mended) for finding in found.found] == [("router", None)]
    assert not found.clean


def test_a_router_that_missed_a_rollback_is_fitted_again(registry: Registry) -> None:
    profile = registry.blobs.put_bytes(b"features")
    job, made = registry.begin("alpha")
    made = replace(made, profile=profile)
    registry.catalogue.publish(job.id, job.attempt, made, None, None)

    registry.mends("router")

    (queued,) = registry.catalogue.jobs(state="queued")
    assert (queued.kind, queued.name) == ("reprofile", "alpha")
    assert queued.request == {"name": "alpha", "generation": made.number}


def test_mending_is_in_the_audit_log(local: Registry) -> None:
    local.blobs.put_bytes(b"orphan")
    local.verify(repair=True, actor=ACTOR)
    newest = local.catalogue.audit(limit=1)[0]
    assert (newest.actor, newest.action, newest.detail) == (ACTOR, "verify", {"mended": {"orphan_blob": 1}})


def test_old_generations_and_what_only_they_need_are_given_up(registry: Registry) -> None:
    made = [registry.register("alpha") for _ in range(4)]
    shared = made[0].files["expert.json"]
    registry.sql(
        update(tables.generations)
        .where(tables.generations.c.number == made[3].number)
        .values(files={k: v.model_dump() for k, v in {**made[3].files, "also": shared}.items()})
    )

    dry = collect_garbage(registry.catalogue, registry.blobs, 2, ACTOR, dry_run=True)
    gone = collect_garbage(registry.catalogue, registry.blobs, 2, ACTOR)

    # alpha@1 stays: the current router knows it by its profile.
    assert gone.generations == tuple(f"alpha@{each.number}" for each in (made[1], made[0]))
    assert gone.blobs == 3
    assert dry == gone
    assert registry.blobs.has(shared.sha256)
    assert registry.catalogue.generation("alpha", made[0].number).state == "collected"
    assert registry.verify().clean
    assert collect_garbage(registry.catalogue, registry.blobs, 2, ACTOR).blobs == 0


def test_routers_that_became_useless_later_are_given_up_though_no_generation_is(registry: Registry) -> None:
    job, made = registry.begin("alpha")
    known = registry.router(2, {"alpha": made.number, "beta": 1})
    registry.catalogue.publish(job.id, job.attempt, made, known, 1)
    slow = Replica("slow", 1, registry.catalogue.revision(), BUILD)
    registry.catalogue.set_alias("see", "beta", ACTOR)
    registry.catalogue.beat(slow)
    assert collect_garbage(registry.catalogue, registry.blobs, 1, ACTOR).generations == ("alpha@1",)
    assert registry.catalogue.router(1).files

    registry.catalogue.drop_replica("slow")
    gone = collect_garbage(registry.catalogue, registry.blobs, 1, ACTOR)
    assert (gone.generations, gone.blobs) == ((), 1)
    assert not registry.catalogue.router(1).files


def test_all_unneeded_blobs_go_in_the_end_where_each_transaction_deletes_one(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collecting, "_DISCARD_SECONDS", 0.0)
    monkeypatch.setattr(garbage, "_PAUSE_SECONDS", 0.0)
    pinned, *_ = [registry.blobs.put_bytes(f"nobody's {number}".encode()) for number in range(20)]
    discard, turns = registry.catalogue.discard, []

    def late(digests: Iterable[str], delete: Callable[[str], object]) -> list[str]:
        # Needed only after it was found to be garbage.
        registry.catalogue.pin_blobs("someone", [pinned.sha256])
        turns.append(discard(digests, delete))
        return turns[-1]

    monkeypatch.setattr(registry.catalogue, "discard", late)
    assert collect_garbage(registry.catalogue, registry.blobs, 1, ACTOR).blobs == 19
    assert [len(gone) for gone in turns if gone] == [1] * 19
    assert registry.blobs.has(pinned.sha256)


def test_what_a_request_or_a_slow_replica_uses_is_kept(registry: Registry) -> None:
    old = registry.register("alpha")
    behind = registry.catalogue.revision()
    registry.register("alpha")
    registry.catalogue.beat(Replica("slow", 1, behind, BUILD))
    assert collect_garbage(registry.catalogue, registry.blobs, 1, ACTOR).generations == ()

    now = registry.catalogue.revision()
    registry.catalogue.beat(Replica("slow", 2, now, BUILD, leases=(f"alpha@{old.number}",)))
    assert collect_garbage(registry.catalogue, registry.blobs, 1, ACTOR).generations == ()

    registry.catalogue.beat(Replica("slow", 3, now, BUILD))
    assert collect_garbage(registry.catalogue, registry.blobs, 1, ACTOR).generations == (
        f"alpha@{old.number}",
    )


def test_a_collection_that_breaks_half_way_is_ended_by_the_next(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(4):
        registry.register("alpha")
    broken = _Failing(registry.blobs, after=1)

    with pytest.raises(BlobError, match="out of reach"):
        collect_garbage(registry.catalogue, broken, 1, ACTOR)  # type: ignore[arg-type]

    found = registry.verify().found
    assert {finding.kind for finding in found} == {"orphan_blob"}
    collect_garbage(registry.catalogue, registry.blobs, 1, ACTOR)
    assert registry.verify().clean


class _Failing:
    """Blobs whose store breaks after some deletions."""

    def __init__(self, blobs: Blobs, after: int) -> None:
        self._blobs, self._left = blobs, after

    def __getattr__(self, name: str) -> Any:
        return getattr(self._blobs, name)

    def delete(self, sha256: str) -> None:
        if not self._left:
            raise BlobError("the store is out of reach")
        self._left -= 1
        self._blobs.delete(sha256)


def test_collecting_beside_registrations_loses_nothing(registry: Registry) -> None:
    stop = threading.Event()

    def collect() -> int:
        rounds = 0
        while not stop.is_set():
            collect_garbage(registry.catalogue, registry.blobs, 1, ACTOR)
            rounds += 1
        return rounds

    def register_again() -> None:
        # The same few contents over and over: what was just given up is wanted again.
        for turn in range(25):
            registry.submit("alpha")
            job = registry.catalogue.claim("replica")
            assert job is not None
            assert job.generation is not None
            data = f"content {turn % 3}".encode()
            entry = _entry(data)
            registry.catalogue.pin_blobs(job.id, [entry.sha256])
            assert registry.blobs.put_bytes(data) == entry
            made = Generation("alpha", job.generation, BUILD, "ready", {"f": entry}, job=job.id)
            registry.catalogue.publish(job.id, job.attempt, made, None, None)
            registry.blobs.check(entry)

    with ThreadPoolExecutor(2) as pool:
        collecting = pool.submit(collect)
        try:
            pool.submit(register_again).result(120)
        finally:
            stop.set()
        assert collecting.result(60) > 0
    collect_garbage(registry.catalogue, registry.blobs, 1, ACTOR)
    assert registry.verify().found == ()


def _entry(data: bytes) -> FileEntry:
    return FileEntry(sha256=hashlib.sha256(data).hexdigest(), nbytes=len(data))


def test_mending_on_a_full_disk_says_so(tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "128k") as small:
        blobs = Blobs.open(str(small), tmp_path / "cache")
        registry = Registry(f"sqlite:///{tmp_path}/catalogue.sqlite", small, blobs)
        data = os.urandom(40_000)
        job, made = registry.begin("alpha")
        entry = blobs.put_bytes(data)
        made = replace(made, files={"weights": entry})
        registry.catalogue.publish(job.id, job.attempt, made, None, None)
        (small / "sha256" / entry.sha256[:2] / entry.sha256).unlink()
        (tmp_path / "bundle").mkdir()
        (tmp_path / "bundle" / "copy").write_bytes(data)
        _fill(small / "filler")

        found = registry.verify(repair=True, folders=[tmp_path / "bundle"], grace_seconds=3600)

        (finding,) = found.found
        assert finding.mended is None
        assert "no room" in finding.problem
        (small / "filler").unlink()
        assert registry.verify(repair=True, folders=[tmp_path / "bundle"], grace_seconds=3600).clean
        registry.catalogue.close()


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 512)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise


class _beating:
    """Beats of a replica while the block lasts."""

    def __init__(self, registry: Registry, name: str, stop: threading.Event) -> None:
        self._registry, self._name, self._stop = registry, name, stop
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        beat = 1
        while not self._stop.wait(0.02):
            beat += 1
            self._registry.catalogue.beat(Replica(self._name, beat, 1, BUILD))

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


Run = Callable[..., Any]


@pytest.fixture
def run(local: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`twinserve registry …` on the registry of `local`."""
    for name in [name for name in os.environ if name.startswith("TWINSERVE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TWINSERVE_STATE_DIR", str(tmp_path))
    monkeypatch.setenv("TWINSERVE_BUNDLE", str(tmp_path / "bundle"))

    def invoke(*arguments: str) -> Any:
        return CliRunner().invoke(build_app(), ["registry", *arguments])

    return invoke


def test_the_command_tells_mends_and_ends_with_a_code(run: Run, local: Registry) -> None:
    sound = run("verify")
    assert sound.exit_code == 0
    assert "everything agrees" in sound.output
    orphan = local.blobs.put_bytes(b"orphan")

    told = run("verify")
    assert told.exit_code == 1
    assert f"orphan_blob  blob {orphan.sha256}" in told.output
    assert "1 of 1 findings are left" in told.output
    assert json.loads(run("verify", "--json").output)["clean"] is False

    mended = run("verify", "--repair")
    assert mended.exit_code == 0
    assert "mended: deleted" in mended.output
    assert json.loads(run("verify", "--json").output)["found"] == []


def test_the_command_collects_and_says_what(run: Run, local: Registry) -> None:
    made = [local.register("alpha") for _ in range(3)]

    assert "were they deleted" in run("gc", "--keep", "1", "--dry-run").output
    gone = run("gc", "--keep", "1", "--json")

    assert gone.exit_code == 0
    assert json.loads(gone.output) == {
        "generations": [f"alpha@{made[1].number}", f"alpha@{made[0].number}"],
        "blobs": 4,
        "bytes": sum(entry.nbytes for each in made[:2] for entry in each.files.values()),
    }
    assert run("gc").output.startswith("0 blobs")


def test_the_command_prints_the_audit_log(run: Run, local: Registry) -> None:
    local.register("alpha")
    lines = run("audit", "--target", "alpha").output.splitlines()
    assert any("tester from 192.0.2.1: register alpha: ok" in line for line in lines)
    entry = json.loads(run("audit", "--limit", "1", "--json").output)
    assert entry["revision"] == local.catalogue.revision()


@pytest.mark.parametrize("command", ["verify", "gc", "audit"])
def test_the_command_says_where_it_looked_for_a_registry(run: Run, tmp_path: Path, command: str) -> None:
    nothing = run(command, "--state-dir", str(tmp_path / "nowhere"))
    assert nothing.exit_code == 2
    assert "there is no registry in" in nothing.output
    assert not (tmp_path / "nowhere").exists()


def test_a_check_without_repair_works_on_a_frozen_disk(local: Registry, tmp_path: Path) -> None:
    local.catalogue.close()
    with mounted(tmp_path / "frozen", "4m", frozen=tmp_path / "blobs") as frozen:
        blobs = Blobs.open(str(frozen), frozen / "cache")
        catalogue = Catalogue.open(local.url, read_only=True)
        assert verify(catalogue, blobs, watch_seconds=0).clean
        blobs_orphan = Blobs.open(str(tmp_path / "blobs"), tmp_path / "cache").put_bytes(b"later")
        assert not blobs.has(blobs_orphan.sha256)
        catalogue.close()


def test_a_frozen_catalogue_is_not_mended_and_told(local: Registry) -> None:
    local.blobs.put_bytes(b"orphan")
    frozen = Catalogue.open(local.url, read_only=True)
    with pytest.raises(CatalogueError):
        verify(frozen, local.blobs, repair=True, watch_seconds=0)
    frozen.close()
