import errno
import hashlib
import os
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from experts.bundle_manifest import FileEntry
from experts.errors import BlobError, CorruptBlobError, MissingBlobError, StorageFullError
from experts.registry.blobs import Blobs
from tests.fixtures.mounts import mounted
from tests.fixtures.object_store import ObjectStoreServer, object_store

__all__ = ["object_store"]

Open = Callable[..., Blobs]


@pytest.fixture(params=["directory", "s3"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def url(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    if kind == "directory":
        return str(tmp_path / "store")
    server: ObjectStoreServer = request.getfixturevalue("object_store")
    return f"{server.bucket()}/some/prefix"


@pytest.fixture
def open_blobs(kind: str, url: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Open]:
    opened: list[Blobs] = []

    def open_one(cache: str = "cache", **options: int) -> Blobs:
        server = request.getfixturevalue("object_store") if kind == "s3" else None
        opened.append(Blobs.open(url, tmp_path / cache, server and server.options, **options))
        return opened[-1]

    yield open_one
    for each in opened:
        each.close()


@pytest.fixture
def blobs(open_blobs: Open) -> Blobs:
    return open_blobs()


@pytest.fixture
def directory(tmp_path: Path) -> Blobs:
    return Blobs.open(str(tmp_path / "store"), tmp_path / "cache")


def entry_of(data: bytes) -> FileEntry:
    return FileEntry(sha256=hashlib.sha256(data).hexdigest(), nbytes=len(data))


def stored_file(root: Path, entry: FileEntry) -> Path:
    return root / "sha256" / entry.sha256[:2] / entry.sha256


def overwrite(path: Path, data: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(data)


def test_what_is_put_comes_back_under_its_digest(blobs: Blobs, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"some bytes")

    entry = blobs.put(tmp_path / "file")

    assert entry == entry_of(b"some bytes")
    assert blobs.path(entry).read_bytes() == b"some bytes"
    assert blobs.has(entry.sha256)
    found = blobs.look(entry.sha256)
    assert found is not None
    assert found.nbytes == 10
    blobs.check(entry)


def test_an_empty_file_is_a_blob_too(blobs: Blobs) -> None:
    entry = blobs.put_bytes(b"")
    assert blobs.path(entry).read_bytes() == b""
    blobs.check(entry)


def test_putting_twice_stores_once(blobs: Blobs, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"again")

    entries = {
        blobs.put_bytes(b"again"),
        blobs.put(tmp_path / "file"),
        blobs.put(tmp_path / "file", known=entry_of(b"again")),
    }

    assert entries == {entry_of(b"again")}
    assert [one.sha256 for one in blobs.list()] == [entry_of(b"again").sha256]
    assert blobs.leftovers() == ()


def test_many_put_the_same_at_once(blobs: Blobs) -> None:
    data = [bytes([number % 5]) * 200_000 for number in range(20)]
    with ThreadPoolExecutor(8) as pool:
        entries = list(pool.map(blobs.put_bytes, data))
    assert entries == [entry_of(each) for each in data]
    assert len(list(blobs.list())) == 5
    for entry in entries:
        blobs.check(entry)


def test_a_file_that_is_not_what_it_was_said_to_be_is_refused(blobs: Blobs, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"changed")
    with pytest.raises(CorruptBlobError, match="changed since"):
        blobs.put(tmp_path / "file", known=entry_of(b"as it was"))
    assert list(blobs.list()) == []
    assert blobs.leftovers() == ()


def test_a_blob_that_is_not_there_is_missing(blobs: Blobs) -> None:
    entry = entry_of(b"never stored")
    assert not blobs.has(entry.sha256)
    with pytest.raises(MissingBlobError):
        blobs.path(entry)
    with pytest.raises(MissingBlobError):
        blobs.check(entry)
    with pytest.raises(MissingBlobError):
        blobs.folder({"a": entry})
    blobs.delete(entry.sha256)


def test_listing_tells_digests_sizes_and_times(blobs: Blobs) -> None:
    assert list(blobs.list()) == []
    one, two = blobs.put_bytes(b"1"), blobs.put_bytes(b"22")

    found = {stored.sha256: stored for stored in blobs.list()}

    assert {sha: stored.nbytes for sha, stored in found.items()} == {one.sha256: 1, two.sha256: 2}
    assert abs(found[one.sha256].modified - found[two.sha256].modified) < 60


def test_a_deleted_blob_is_gone_from_store_and_cache(blobs: Blobs) -> None:
    entry, other = blobs.put_bytes(b"gone"), blobs.put_bytes(b"kept")
    blobs.path(entry)

    blobs.delete(entry.sha256)

    with pytest.raises(MissingBlobError):
        blobs.path(entry)
    assert blobs.path(other).read_bytes() == b"kept"


def test_a_folder_has_exactly_its_files_and_is_made_once(blobs: Blobs) -> None:
    files = {"model.bin": blobs.put_bytes(b"model"), "sub/config.json": blobs.put_bytes(b"{}")}

    folder = blobs.folder(files)

    assert {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    } == {
        "model.bin": b"model",
        "sub/config.json": b"{}",
    }
    assert blobs.folder(dict(reversed(files.items()))) == folder
    assert blobs.folder({"model.bin": files["model.bin"]}) != folder


def test_many_make_the_same_folder_at_once(blobs: Blobs) -> None:
    files = {f"file-{number}": blobs.put_bytes(bytes([number])) for number in range(10)}
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: blobs.folder(files), range(16)))
    assert len(found) == 1
    assert len(list(found.pop().iterdir())) == 10


@pytest.mark.parametrize(
    "name", ["../outside", "/absolute", "a/../../b", "", "a//b", ".", "back\\slash", "nul\0"]
)
def test_a_folder_lets_no_name_out(directory: Blobs, name: str) -> None:
    with pytest.raises(BlobError, match="no plain relative path"):
        directory.folder({name: directory.put_bytes(b"x")})


def test_a_placed_folder_stays_where_it_was_wanted(blobs: Blobs, tmp_path: Path) -> None:
    files = {"shared/model": blobs.put_bytes(b"m")}
    blobs.place(files, tmp_path / "place" / "bundle")
    blobs.place(files, tmp_path / "place" / "bundle")
    assert [path.name for path in (tmp_path / "place").iterdir()] == ["bundle"]
    assert (tmp_path / "place" / "bundle" / "shared" / "model").read_bytes() == b"m"


def test_a_folder_whose_file_was_changed_or_added_to_is_made_anew(kind: str, blobs: Blobs) -> None:
    files = {"a": blobs.put_bytes(b"aaaa"), "b": blobs.put_bytes(b"bbbb")}
    folder = blobs.folder(files)
    (folder / "a").unlink()
    (folder / "a").write_bytes(b"evil")
    (folder / "extra").write_bytes(b"")

    assert sorted(path.name for path in blobs.folder(files).iterdir()) == ["a", "b"]
    assert (blobs.folder(files) / "a").read_bytes() == b"aaaa"


@pytest.mark.parametrize("content", [b"evil", b"longer than before", b""])
def test_a_corrupt_blob_of_a_directory_is_told_and_never_served(
    directory: Blobs, tmp_path: Path, content: bytes
) -> None:
    entry = directory.put_bytes(b"good")
    folder = directory.folder({"name": entry})
    overwrite(stored_file(tmp_path / "store", entry), content)

    for ask in (directory.path, directory.check, lambda one: directory.folder({"name": one})):
        with pytest.raises(CorruptBlobError, match=entry.sha256[:8]):
            ask(entry)
    assert folder.exists()


def test_a_digest_is_computed_once_and_again_when_the_file_changes(directory: Blobs, tmp_path: Path) -> None:
    entry = directory.put_bytes(b"good")
    path = stored_file(tmp_path / "store", entry)
    about = path.stat()
    overwrite(path, b"evil")
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))

    # Same inode, time and size: read before, so not again, unless a check wants to know what is there.
    directory.path(entry)
    with pytest.raises(CorruptBlobError):
        directory.check(entry)
    with pytest.raises(CorruptBlobError):
        Blobs.open(str(tmp_path / "store"), tmp_path / "cache").path(entry)


def test_putting_a_corrupt_blob_again_mends_it(directory: Blobs, tmp_path: Path) -> None:
    entry = directory.put_bytes(b"good")
    overwrite(stored_file(tmp_path / "store", entry), b"evil")

    assert directory.put_bytes(b"good") == entry

    directory.check(entry)
    assert directory.path(entry).read_bytes() == b"good"


@pytest.mark.parametrize("which", ["blob", "folder", "root of all"])
def test_links_in_the_store_are_refused(directory: Blobs, tmp_path: Path, which: str) -> None:
    entry = directory.put_bytes(b"good")
    path = stored_file(tmp_path / "store", entry)
    moved = {"blob": path, "folder": path.parent, "root of all": path.parent.parent}[which]
    moved.rename(tmp_path / "elsewhere")
    moved.symlink_to(tmp_path / "elsewhere")

    with pytest.raises(CorruptBlobError, match="symbolic link"):
        directory.path(entry)
    with pytest.raises(CorruptBlobError, match="symbolic link"):
        directory.check(entry)


def test_something_that_is_no_file_is_refused(directory: Blobs, tmp_path: Path) -> None:
    entry = directory.put_bytes(b"good")
    stored_file(tmp_path / "store", entry).unlink()
    os.mkfifo(stored_file(tmp_path / "store", entry))
    with pytest.raises(CorruptBlobError, match="no plain file"):
        directory.path(entry)


def test_a_damaged_cached_copy_is_fetched_again(object_store: ObjectStoreServer, tmp_path: Path) -> None:
    blobs = Blobs.open(object_store.bucket(), tmp_path / "cache", object_store.options)
    entry = blobs.put_bytes(b"good")
    copy = blobs.path(entry)
    overwrite(copy, b"evil")
    assert blobs.path(entry).read_bytes() == b"good"

    folder = blobs.folder({"name": entry})
    overwrite(blobs.path(entry), b"evil")
    assert (blobs.folder({"name": entry}) / "name").read_bytes() == b"good"
    assert blobs.folder({"name": entry}) == folder
    blobs.close()


def test_a_damaged_object_is_told_and_never_served(object_store: ObjectStoreServer, tmp_path: Path) -> None:
    bucket = object_store.bucket()
    blobs = Blobs.open(bucket, tmp_path / "cache", object_store.options)
    entry = blobs.put_bytes(b"good")
    object_store.damage(f"{bucket}/sha256/{entry.sha256[:2]}/{entry.sha256}", b"evil")

    blobs.path(entry)
    with pytest.raises(CorruptBlobError):
        blobs.check(entry)
    other = Blobs.open(bucket, tmp_path / "other cache", object_store.options)
    with pytest.raises(CorruptBlobError, match="differs from its digest"):
        other.path(entry)
    assert not [
        path for path in (tmp_path / "other cache").rglob("*") if path.is_file() and path.name != "lock"
    ]
    for each in (blobs, other):
        each.close()


def test_one_machine_reads_what_another_put(object_store: ObjectStoreServer, tmp_path: Path) -> None:
    bucket = object_store.bucket()
    one = Blobs.open(bucket, tmp_path / "one", object_store.options)
    two = Blobs.open(bucket, tmp_path / "two", object_store.options)
    files = {"a": one.put_bytes(b"a" * 100_000), "b/c": one.put_bytes(b"c")}

    assert not two.has(entry_of(b"later").sha256)
    later = one.put_bytes(b"later")
    assert two.has(later.sha256)
    assert two.path(later).read_bytes() == b"later"
    assert (two.folder(files) / "b" / "c").read_bytes() == b"c"
    for each in (one, two):
        each.close()


def test_an_upload_in_parts_is_read_back(object_store: ObjectStoreServer, tmp_path: Path) -> None:
    # s3fs sends larger files in parts; the tag of those is no digest of the content.
    data = os.urandom(2**20) * 101
    bucket = object_store.bucket()
    blobs = Blobs.open(bucket, tmp_path / "cache", object_store.options)
    entry = blobs.put_bytes(data)
    assert object_store.content(f"{bucket}/sha256/{entry.sha256[:2]}/{entry.sha256}") == data
    blobs.close()


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("nonsense://place", {}, "nonsense"),
        ("file://host/folder", {}, "three slashes"),
        ("s3://bucket", {"no_such_option": 1}, "no_such_option"),
    ],
)
def test_a_store_that_cannot_be_is_refused_with_its_reason(
    tmp_path: Path, url: str, options: dict[str, int], message: str
) -> None:
    with pytest.raises(BlobError, match=message):
        Blobs.open(url, tmp_path / "cache", options).has("0" * 64)


def test_a_bucket_that_is_not_there_is_an_error_of_the_store(
    object_store: ObjectStoreServer, tmp_path: Path
) -> None:
    blobs = Blobs.open("s3://no-such-bucket", tmp_path / "cache", object_store.options)
    with pytest.raises(BlobError, match="s3://no-such-bucket") as refused:
        blobs.put_bytes(b"x")
    assert not isinstance(refused.value, MissingBlobError)
    assert not any((tmp_path / "cache" / "incoming").iterdir())
    blobs.close()


def test_a_store_that_nobody_answers_for_is_an_error(tmp_path: Path) -> None:
    options = {
        "key": "k",
        "secret": "s",
        "endpoint_url": "http://127.0.0.1:9",
        "config_kwargs": {"retries": {"max_attempts": 1}, "connect_timeout": 1},
    }
    blobs = Blobs.open("s3://bucket", tmp_path / "cache", options)
    with pytest.raises(BlobError, match="s3://bucket"):
        blobs.put_bytes(b"x")
    blobs.close()


def test_a_full_disk_is_told_and_leaves_nothing_half(tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "256k") as small:
        blobs = Blobs.open(str(small / "store"), tmp_path / "cache")
        kept = blobs.put_bytes(b"k" * 50_000)

        with pytest.raises(StorageFullError, match="no room"):
            blobs.put_bytes(os.urandom(500_000))

        blobs.check(kept)
        assert [one.sha256 for one in blobs.list()] == [kept.sha256]
        assert blobs.leftovers() == ()
        blobs.delete(kept.sha256)
        blobs.check(blobs.put_bytes(b"n" * 60_000))


def test_a_full_cache_disk_is_told(object_store: ObjectStoreServer, tmp_path: Path) -> None:
    bucket = object_store.bucket()
    here = Blobs.open(bucket, tmp_path / "cache", object_store.options)
    entry = here.put_bytes(os.urandom(500_000))
    with mounted(tmp_path / "small", "256k") as small:
        there = Blobs.open(bucket, small / "cache", object_store.options)
        with pytest.raises(StorageFullError):
            there.path(entry)
        there.close()
    here.close()


def test_a_file_size_limit_is_told_as_full(directory: Blobs) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(StorageFullError):
            directory.put_bytes(b"x" * 200_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(directory.list()) == []
    assert directory.leftovers() == ()


def test_a_read_only_store_is_read_and_refuses_to_be_written(directory: Blobs, tmp_path: Path) -> None:
    entry = directory.put_bytes(b"kept")
    with mounted(tmp_path / "frozen", "1m", frozen=tmp_path / "store") as frozen:
        blobs = Blobs.open(str(frozen), frozen / "cache")
        assert blobs.path(entry).read_bytes() == b"kept"
        assert (blobs.folder({"a": entry}) / "a").read_bytes() == b"kept"
        assert [one.sha256 for one in blobs.list()] == [entry.sha256]
        for change in (lambda: blobs.put_bytes(b"new"), lambda: blobs.delete(entry.sha256)):
            with pytest.raises(BlobError, match="Read-only"):
                change()


def test_a_writer_that_is_killed_leaves_only_what_is_told_as_left_over(
    directory: Blobs, tmp_path: Path
) -> None:
    fifo = tmp_path / "endless"
    os.mkfifo(fifo)
    script = textwrap.dedent(
        f"""
        from pathlib import Path
        from experts.registry.blobs import Blobs
        Blobs.open({str(tmp_path / "store")!r}, Path({str(tmp_path / "cache")!r})).put(Path({str(fifo)!r}))
        """
    )
    with subprocess.Popen([sys.executable, "-c", script]) as writer, fifo.open("wb", buffering=0) as sent:
        # More than the pipe holds: when all is written, the writer has begun to copy.
        sent.write(b"x" * 2**20)
        writer.kill()
        writer.wait(30)
    with directory.sweeping():
        left = directory.leftovers()
        for name in left:
            directory.remove_leftover(name)
    assert len(left) == 1
    assert list(directory.list()) == []
    assert directory.leftovers() == ()


def test_sweeping_waits_for_who_puts(directory: Blobs, tmp_path: Path) -> None:
    fifo = tmp_path / "slow"
    os.mkfifo(fifo)
    with ThreadPoolExecutor(2) as pool:
        putting = pool.submit(directory.put, fifo)
        with fifo.open("wb", buffering=0) as sent:
            sent.write(b"x" * 2**20)  # it holds the lock by now

            def sweep() -> bool:
                with directory.sweeping():
                    return directory.has(entry_of(b"x" * 2**20 + b"end").sha256)

            sweeping = pool.submit(sweep)
            assert not sweeping.done()
            sent.write(b"end")
        putting.result(30)
        assert sweeping.result(30)


def test_a_cache_stays_below_its_bound(object_store: ObjectStoreServer, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    blobs = Blobs.open(object_store.bucket(), cache, object_store.options, cache_bytes=250_000)
    entries = [blobs.put_bytes(bytes([number]) * 100_000) for number in range(6)]
    folder = blobs.folder({"a": entries[0]})
    for age, path in enumerate([folder, *(blobs.path(entry) for entry in entries)]):
        about = path.stat()
        long_ago = about.st_mtime_ns - (10_000 - age) * 10**9
        os.utime(path, ns=(long_ago, long_ago))

    blobs.trim()

    held = [path for path in (cache / "sha256").rglob("*") if path.is_file()]
    assert {path.name for path in held} == {entry.sha256 for entry in entries[-2:]}
    assert not folder.exists()
    assert blobs.path(entries[0]).stat().st_size == 100_000
    blobs.close()


def test_folders_of_a_store_on_the_same_disk_cost_nothing_and_stay(tmp_path: Path) -> None:
    blobs = Blobs.open(str(tmp_path / "store"), tmp_path / "cache", cache_bytes=10)
    entry = blobs.put_bytes(b"x" * 1000)
    folder = blobs.folder({"a": entry})
    os.utime(folder, (1, 1))

    blobs.trim()
    assert (folder / "a").samefile(blobs.path(entry))

    blobs.delete(entry.sha256)
    blobs.trim()
    assert not folder.exists()


def test_folders_of_deleted_blobs_give_their_bytes_back(blobs: Blobs) -> None:
    gone, kept = blobs.put_bytes(b"gone"), blobs.put_bytes(b"kept")
    folders = [blobs.folder({"a": gone, "b": kept}), blobs.folder({"a": gone}), blobs.folder({"b": kept})]
    for folder in folders:
        os.utime(folder, (1, 1))
    used = blobs.folder({"x": gone})

    blobs.delete(gone.sha256)
    blobs.tidy()

    assert [folder.exists() for folder in folders] == [False, False, True]
    assert used.exists()


def test_copies_stand_in_where_links_cannot_be(tmp_path: Path) -> None:
    with mounted(tmp_path / "other", "1m") as other:
        blobs = Blobs.open(str(tmp_path / "store"), other / "cache")
        entry = blobs.put_bytes(b"data")
        with pytest.raises(OSError) as refused:  # noqa: PT011
            os.link(blobs.path(entry), other / "link")
        assert refused.value.errno == errno.EXDEV
        assert (blobs.folder({"a": entry}) / "a").read_bytes() == b"data"


def test_parts_of_an_upload_that_rests_are_left_over(object_store: ObjectStoreServer, tmp_path: Path) -> None:
    # The server says of every upload that it was begun in 2010.
    bucket = object_store.bucket()
    object_store.begin_upload(f"{bucket}/mine/sha256/00/{'0' * 64}")
    blobs = Blobs.open(f"{bucket}/mine", tmp_path / "cache", object_store.options)
    others = Blobs.open(f"{bucket}/other", tmp_path / "cache", object_store.options)

    assert others.leftovers() == ()
    (left,) = blobs.leftovers()
    blobs.remove_leftover(left)
    assert blobs.leftovers() == ()
    for each in (blobs, others):
        each.close()
