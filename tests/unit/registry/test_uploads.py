"""Uploads keep what they acknowledged, through restarts, clients that hang up and disks that fill."""

import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from experts.errors import (
    BlobError,
    CheckpointError,
    OffsetError,
    RecordNotFoundError,
    RegistryFullError,
    SourceError,
    SourceTooLargeError,
    StorageFullError,
    TransitionError,
)
from experts.registry.sources import UploadLimits, UploadStore

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def store(root: Path, clock: Callable[[], float] | None = None, **limits: float) -> UploadStore:
    bounds = UploadLimits(**{"nbytes": 10_000, "uploads": 3, "seconds": 60.0, **limits})  # type: ignore[arg-type]
    return UploadStore(root / "uploads", bounds, clock or Clock())


def send(uploads: UploadStore, upload_id: str, name: str, content: bytes, offset: int = 0) -> None:
    with uploads.writing(upload_id, name, offset) as writer:
        writer.write(content)


def test_a_file_grows_part_by_part_and_survives_a_restart(tmp_path: Path) -> None:
    uploads = store(tmp_path)
    upload = uploads.create()
    assert (upload.files, upload.nbytes) == ({}, 0)
    send(uploads, upload.id, WEIGHTS, b"abc")
    again = store(tmp_path)
    assert again.describe(upload.id).files == {WEIGHTS: 3}
    send(again, upload.id, WEIGHTS, b"def", 3)
    send(again, upload.id, CONFIG, b"{}")
    folder = again.folder(upload.id)
    assert (folder / WEIGHTS).read_bytes() == b"abcdef"
    assert again.describe(upload.id).nbytes == 8
    assert [one.id for one in again.all()] == [upload.id]


@pytest.mark.parametrize("offset", [0, 2, 4, 2**40])
def test_a_part_must_go_on_where_the_file_ends(tmp_path: Path, offset: int) -> None:
    uploads = store(tmp_path)
    upload = uploads.create()
    send(uploads, upload.id, WEIGHTS, b"abc")
    with pytest.raises(OffsetError, match="ends at 3"):
        send(uploads, upload.id, WEIGHTS, b"x", offset)
    assert (uploads.folder(upload.id) / WEIGHTS).read_bytes() == b"abc"


def test_bytes_that_were_never_acknowledged_are_cut_off(tmp_path: Path) -> None:
    uploads = store(tmp_path)
    upload = uploads.create()
    send(uploads, upload.id, WEIGHTS, b"abc")
    path = uploads.folder(upload.id) / WEIGHTS
    path.write_bytes(b"abc\0\0\0\0")  # what a power cut can leave
    send(uploads, upload.id, WEIGHTS, b"def", 3)
    assert path.read_bytes() == b"abcdef"
    path.write_bytes(b"abcdef\0")
    assert (uploads.folder(upload.id) / WEIGHTS).read_bytes() == b"abcdef"


def test_a_killed_writer_leaves_what_it_had_secured(tmp_path: Path) -> None:
    uploads = store(tmp_path)
    upload = uploads.create()
    send(uploads, upload.id, WEIGHTS, b"abc")
    script = (
        "import sys, time; from pathlib import Path\n"
        "from experts.registry.sources import UploadLimits, UploadStore\n"
        f"uploads = UploadStore(Path({str(tmp_path / 'uploads')!r}), UploadLimits(10_000, 3, 60.0))\n"
        f"with uploads.writing({upload.id!r}, {WEIGHTS!r}, 3) as writer:\n"
        "    writer.write(b'lost'); print('written', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"written\n"
        with pytest.raises(TransitionError, match="being written"):  # another process is refused meanwhile
            send(uploads, upload.id, WEIGHTS, b"def", 3)
        with pytest.raises(TransitionError, match="being written"):
            uploads.remove(upload.id)
        with pytest.raises(TransitionError, match="being written"):
            uploads.folder(upload.id)
        process.send_signal(signal.SIGKILL)
    assert uploads.describe(upload.id).files == {WEIGHTS: 3}
    send(uploads, upload.id, WEIGHTS, b"def", 3)
    assert (uploads.folder(upload.id) / WEIGHTS).read_bytes() == b"abcdef"


def test_an_error_in_the_middle_keeps_what_came_before(tmp_path: Path) -> None:
    uploads = store(tmp_path)
    upload = uploads.create()

    def hangs_up() -> None:
        with uploads.writing(upload.id, WEIGHTS, 0) as writer:
            writer.write(b"abc")
            raise RuntimeError("the client hung up")

    with pytest.raises(RuntimeError):
        hangs_up()
    assert uploads.describe(upload.id).files == {WEIGHTS: 3}


def test_two_writers_of_one_file_are_refused_and_of_two_files_are_not(tmp_path: Path) -> None:
    uploads = store(tmp_path)
    upload = uploads.create()
    with uploads.writing(upload.id, WEIGHTS, 0) as writer, uploads.writing(upload.id, CONFIG, 0) as other:
        writer.write(b"abc")
        other.write(b"{}")
        with pytest.raises(TransitionError, match="another request"), uploads.writing(upload.id, WEIGHTS, 0):
            raise AssertionError("two writers")
    assert uploads.describe(upload.id).files == {CONFIG: 2, WEIGHTS: 3}


def test_all_files_together_are_bounded_while_they_come(tmp_path: Path) -> None:
    uploads = store(tmp_path, nbytes=100)
    upload = uploads.create()
    with uploads.writing(upload.id, WEIGHTS, 0) as writer, uploads.writing(upload.id, CONFIG, 0) as other:
        writer.write(b"x" * 60)
        other.write(b"y" * 40)
        with pytest.raises(SourceTooLargeError, match="100 bytes"):
            other.write(b"y")
    assert uploads.describe(upload.id).nbytes == 100
    with pytest.raises(SourceTooLargeError):
        send(uploads, upload.id, WEIGHTS, b"x", 60)
    uploads.remove_file(upload.id, CONFIG)
    send(uploads, upload.id, WEIGHTS, b"x" * 40, 60)


def test_a_file_can_be_sent_anew(tmp_path: Path) -> None:
    uploads = store(tmp_path)
    upload = uploads.create()
    send(uploads, upload.id, WEIGHTS, b"wrong")
    assert uploads.remove_file(upload.id, WEIGHTS).files == {}
    with pytest.raises(RecordNotFoundError, match="no file"):
        uploads.remove_file(upload.id, "../../etc/passwd")
    send(uploads, upload.id, WEIGHTS, b"right")
    assert (uploads.folder(upload.id) / WEIGHTS).read_bytes() == b"right"


def test_begun_uploads_are_bounded_and_registered_ones_do_not_count(tmp_path: Path) -> None:
    uploads = store(tmp_path, uploads=2)
    first, _ = uploads.create(), uploads.create()
    with pytest.raises(RegistryFullError, match="max_uploads"):
        uploads.create()
    send(uploads, first.id, CONFIG, b"{}")
    entries = {path.name: entry for path, entry in uploads.digests(first.id).items()}
    uploads.close(first.id, entries)
    uploads.create()
    closed = uploads.describe(first.id)
    assert closed.registered == entries
    assert closed.files == {CONFIG: 2}
    assert not (tmp_path / "uploads" / first.id / "files" / CONFIG).exists()
    for change in (
        lambda: send(uploads, first.id, WEIGHTS, b""),
        lambda: uploads.remove_file(first.id, CONFIG),
        lambda: uploads.folder(first.id),
    ):
        with pytest.raises(TransitionError, match="registered"):
            change()
    uploads.remove(first.id)
    with pytest.raises(RecordNotFoundError):
        uploads.describe(first.id)


def test_an_upload_that_rests_is_removed_and_one_that_grows_is_not(tmp_path: Path) -> None:
    clock = Clock()
    uploads, neighbour = store(tmp_path, clock), store(tmp_path, clock)
    resting, growing = uploads.create(), uploads.create()
    neighbour.all()
    clock.now = 50
    send(uploads, growing.id, CONFIG, b"{}")
    assert uploads.describe(resting.id).expires_in == 10
    neighbour.all()
    clock.now = 61
    assert neighbour.expire() == (resting.id,)
    assert [one.id for one in uploads.all()] == [growing.id]
    assert uploads.expire() == ()


def test_what_was_kept_for_an_upload_is_let_go_before_it_is(tmp_path: Path) -> None:
    clock, let_go = Clock(), []

    def released(upload_id: str) -> None:
        assert uploads.describe(upload_id).id == upload_id
        let_go.append(upload_id)

    uploads = UploadStore(tmp_path / "uploads", UploadLimits(100, 3, 60.0), clock, released)
    first, second, third = (uploads.create().id for _ in range(3))
    uploads.remove(second)
    clock.now = 61
    uploads.create()
    assert let_go == [second, *sorted([first, third])]


def test_a_wall_clock_that_jumps_removes_nothing(tmp_path: Path) -> None:
    uploads = store(tmp_path)
    upload = uploads.create()
    for stamp in (0, 2**33):
        os.utime(tmp_path / "uploads" / upload.id / "upload.json", (stamp, stamp))
        assert uploads.expire() == ()
        assert store(tmp_path).expire() == ()


def test_what_a_crash_left_of_an_upload_goes(tmp_path: Path) -> None:
    uploads = store(tmp_path)
    upload = uploads.create()
    left = tmp_path / "uploads" / ("upload-" + "0" * 24)
    left.mkdir()
    (left / WEIGHTS).write_bytes(b"x")
    assert uploads.expire() == (left.name,)
    assert [one.id for one in uploads.all()] == [upload.id]


@pytest.mark.parametrize(
    "upload_id", ["", ".", "..", "../x", "upload-1", "upload-" + "g" * 24, "x" * 5000, "upload.json"]
)
def test_an_id_that_is_none_is_not_found(tmp_path: Path, upload_id: str) -> None:
    uploads = store(tmp_path)
    uploads.create()
    for ask in (uploads.describe, uploads.remove, uploads.folder):
        with pytest.raises(RecordNotFoundError):
            ask(upload_id)


@pytest.mark.parametrize(
    ("name", "error", "why"),
    [
        ("../x.safetensors", SourceError, "plain file name"),
        ("/etc/passwd", SourceError, "plain file name"),
        ("a\\b.safetensors", SourceError, "plain file name"),
        ("", SourceError, "plain file name"),
        ("..", SourceError, "plain file name"),
        ("upload.json", SourceError, "made of"),
        ("model.safetensors\n", SourceError, "plain file name"),
        ("mo\u202edel.safetensors", SourceError, "plain file name"),
        ("ｍodel.safetensors", SourceError, "made of"),
        ("x" * 129, SourceError, "limit is 128"),
        ("x" * 120 + ".gguf", SourceError, "made of"),
        ("README.md", SourceError, "made of"),
        ("model-1-of-2.safetensors", SourceError, "made of"),
        ("pytorch_model.bin", CheckpointError, "pickle"),
        ("adapter_model.PT", CheckpointError, "pickle"),
        ("optimizer.pkl", CheckpointError, "pickle"),
        ("modeling_llama.py", CheckpointError, "code"),
        ("kernel.so", CheckpointError, "code"),
        ("lora.zip", CheckpointError, "archive"),
        ("lora.tar.gz", CheckpointError, "archive"),
        ("chat_template.jinja", CheckpointError, "chat template"),
        ("additional.jinja", CheckpointError, "chat template"),
        ("tokenizer_config.json", CheckpointError, "tokenizer"),
        ("tokenizer.json", CheckpointError, "tokenizer"),
    ],
)
def test_a_name_that_no_expert_has_is_refused_with_its_reason(
    tmp_path: Path, name: str, error: type[Exception], why: str
) -> None:
    uploads = store(tmp_path)
    upload = uploads.create()
    with pytest.raises(error, match=why):
        send(uploads, upload.id, name, b"x")
    assert not list((tmp_path / "uploads" / upload.id / "files").iterdir())


def test_a_link_in_place_of_a_file_is_not_followed(tmp_path: Path) -> None:
    uploads = store(tmp_path)
    upload = uploads.create()
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    (tmp_path / "uploads" / upload.id / "files" / WEIGHTS).symlink_to(secret)
    with pytest.raises(BlobError):
        send(uploads, upload.id, WEIGHTS, b"x")
    assert secret.read_bytes() == b"secret"


def test_a_full_disk_is_told_and_leaves_the_rest(tmp_path: Path) -> None:
    """The kernel's own limit on a file's size is as good as a disk that is full."""
    uploads = store(tmp_path, nbytes=2**20)
    upload = uploads.create()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(StorageFullError, match="no room"):
            send(uploads, upload.id, WEIGHTS, b"x" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert uploads.describe(upload.id).files == {WEIGHTS: 4096}
    send(uploads, upload.id, WEIGHTS, b"x" * 5904, 4096)
    assert uploads.describe(upload.id).nbytes == 10_000


def test_many_threads_and_stores_lose_nothing(tmp_path: Path) -> None:
    first, second = store(tmp_path, uploads=40), store(tmp_path, uploads=40)
    made: list[tuple[str, bytes]] = []

    def work(uploads: UploadStore, number: int) -> None:
        for i in range(4):
            content = f"{number} {i}".encode()
            upload = uploads.create()
            send(uploads, upload.id, WEIGHTS, content[:2])
            send(uploads, upload.id, CONFIG, b"{}")
            send(uploads, upload.id, WEIGHTS, content[2:], 2)
            made.append((upload.id, content))

    threads = [threading.Thread(target=work, args=((first, second)[i % 2], i)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 32
    for upload_id, content in made:
        assert (second.folder(upload_id) / WEIGHTS).read_bytes() == content
        assert first.describe(upload_id).files == {CONFIG: 2, WEIGHTS: 3}
