"""The command line's side of HTTP: what a server sends is never trusted, what a folder holds is chosen by name."""

import asyncio
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import httpx
import pytest
from starlette.types import Message

from service.api.tar import TarStream
from service.remote import RefusedError, RemoteError, Server, UnreachableError
from service.remote.archives import top_of, unpack
from service.remote.jobs import read_events
from service.remote.sources import SourceError, files_of
from service.remote.uploads import Remembered


def _archive(*members: tuple[str, bytes, bytes]) -> bytes:
    """Name, content and type of each member."""
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as archive:
        for name, content, kind in members:
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(content), kind, "/etc/passwd"
            archive.addfile(info, io.BytesIO(content))
    return held.getvalue()


def _plain(name: str, content: bytes = b"x") -> tuple[str, bytes, bytes]:
    return name, content, tarfile.REGTYPE


def _unpack(content: bytes, target: Path, show: Callable[[int], None] = lambda _: None) -> list[str]:
    pieces = (content[start : start + 1000] for start in range(0, len(content), 1000))
    return unpack(httpx.Response(200, content=pieces), target, show)


def test_an_archive_becomes_a_folder(tmp_path: Path) -> None:
    seen: list[int] = []
    content = _archive(_plain("a-1-peft/one.json", b"1" * 2000), _plain("a-1-peft/two.bin", b""))
    names = _unpack(content, tmp_path / "out", seen.append)
    assert names == ["one.json", "two.bin"]
    assert (tmp_path / "out" / "one.json").read_bytes() == b"1" * 2000
    assert seen[-1] == len(content)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "content",
    [
        _archive(_plain("/etc/x")),
        _archive(_plain("top/../x")),
        _archive(_plain("../x")),
        _archive(_plain("top/a/b")),
        _archive(_plain("x")),
        _archive(_plain("top/.hidden")),
        _archive(_plain("top/x\n")),
        _archive(("top/x", b"", tarfile.SYMTYPE)),
        _archive(("top/x", b"", tarfile.LNKTYPE)),
        _archive(("top/x", b"", tarfile.FIFOTYPE)),
        _archive(("top/x", b"", tarfile.DIRTYPE)),
        _archive(_plain("top/x"), _plain("top/x")),
        _archive(_plain("top/x", bytes(4000)))[:2000],
        b"<html>no archive</html>" * 100,
        b"",
    ],
)
def test_a_hostile_or_broken_archive_leaves_nothing(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(RemoteError):
        _unpack(content, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 8704, 9216, 10240, 700_000])
def test_what_the_server_sends_is_a_whole_archive_of_the_length_it_announced(
    size: int, tmp_path: Path
) -> None:
    folder = tmp_path / "made"
    folder.mkdir()
    content = bytes(range(256)) * (size // 256 + 1)
    (folder / "one.bin").write_bytes(content[:size])
    (folder / "two.bin").write_bytes(b"2")
    closed: list[bool] = []

    async def close() -> None:
        closed.append(True)

    async def served() -> bytes:
        stream = TarStream(folder, ["one.bin", "two.bin"], "top", close)
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        async def receive() -> Message:
            await asyncio.Event().wait()
            raise AssertionError("nothing is received")

        await stream({"type": "http"}, receive, send)
        body = b"".join(message["body"] for message in sent[1:])
        assert dict(sent[0]["headers"])[b"content-length"] == str(len(body)).encode()
        assert len(body) % 10240 == 0
        return body

    assert _unpack(asyncio.run(served()), tmp_path / "out") == ["one.bin", "two.bin"]
    assert (tmp_path / "out" / "one.bin").read_bytes() == content[:size]
    assert closed == [True]


def _top(disposition: str) -> str:
    return top_of(httpx.Response(200, headers={"content-disposition": disposition}))


def test_an_archives_name_is_a_plain_one() -> None:
    assert _top('attachment; filename="a-1-peft.tar"') == "a-1-peft"
    assert _top('attachment; filename="../../x.tar"') == "export"
    assert _top("attachment") == "export"


def test_events_are_read_with_their_ids_and_the_rest_is_passed_over() -> None:
    lines = [
        ": keep-alive", "", "event: progress", "id: 1", 'data: {"state": "running",', 'data: "percent": 3}', "",
        "data: {broken", "", "data: [1]", "", 'data: {"error": {}}', "", "event: end", "id: 2",
        'data: {"state": "succeeded"}', "",
    ]  # fmt: skip
    assert list(read_events(lines)) == [
        ("1", {"state": "running", "percent": 3}),
        ("2", {"state": "succeeded"}),
    ]


@pytest.mark.parametrize(
    ("present", "sent"),
    [
        (
            ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "config.json", "README.md"],
            ["adapter_config.json", "adapter_model.safetensors"],
        ),
        (
            ["config.json", "generation_config.json", "model-00001-of-00002.safetensors", "optimizer.pt",
             "model-00002-of-00002.safetensors", "model.safetensors.index.json", "chat_template.jinja"],
            ["config.json", "generation_config.json", "model-00001-of-00002.safetensors",
             "model-00002-of-00002.safetensors", "model.safetensors.index.json"],
        ),
        (
            ["expert.json", "expert.safetensors", "twinserve.sig", ".DS_Store"],
            ["expert.json", "expert.safetensors", "twinserve.sig"],
        ),
        (["a.gguf", "notes.txt"], ["a.gguf"]),
    ],
)  # fmt: skip
def test_a_folder_sends_what_an_expert_is_made_of_and_nothing_else(
    present: list[str], sent: list[str], tmp_path: Path
) -> None:
    for name in present:
        (tmp_path / name).write_text(name)
    assert sorted(files_of(tmp_path)) == sorted(sent)
    assert sorted(files_of(tmp_path / sent[-1])) == sorted(sent)  # or one file of it


@pytest.mark.parametrize("present", [[], ["adapter_config.json"], ["a.gguf", "b.gguf"], ["model.bin"]])
def test_a_folder_without_a_fine_tune_is_refused_here(present: list[str], tmp_path: Path) -> None:
    for name in present:
        (tmp_path / name).write_text(name)
    with pytest.raises(SourceError):
        files_of(tmp_path)
    with pytest.raises(SourceError, match="neither a file nor a folder"):
        files_of(tmp_path / "missing")


def test_what_cannot_be_remembered_is_forgotten_without_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    nowhere = Remembered(tmp_path / "file" / "uploads.json")
    nowhere.put("a", "b")
    assert nowhere.get("a") is None
    (tmp_path / "broken.json").write_text("{")
    assert Remembered(tmp_path / "broken.json").get("a") is None
    known = Remembered(tmp_path / "known.json")
    for number in range(150):
        known.put(str(number), f"upload-{number}")
    assert (known.get("0"), known.get("149")) == (None, "upload-149")


Answer = tuple[int, dict[str, str], bytes]


@pytest.fixture
def answering() -> Iterator[Callable[[list[Answer]], tuple[str, list[tuple[str, str]]]]]:
    """Starts a server that gives these answers in turn; its URL, and what it was asked."""
    servers: list[ThreadingHTTPServer] = []

    def start(answers: list[Answer]) -> tuple[str, list[tuple[str, str]]]:
        asked: list[tuple[str, str]] = []

        class Handler(BaseHTTPRequestHandler):
            def _answer(self) -> None:
                self.rfile.read(int(self.headers.get("content-length", 0)))
                asked.append((self.command, self.headers.get("idempotency-key", "")))
                status, headers, body = answers[min(len(asked), len(answers)) - 1]
                self.send_response(status)
                for name, value in {**headers, "content-length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = _answer

            def log_message(self, *_: object) -> None:
                """Quiet."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}", asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_busy_server_is_asked_again_with_the_same_key_after_the_time_it_names(answering) -> None:
    busy = (
        503,
        {"retry-after": "3"},
        b'{"error": {"message": "later", "code": "queue_full", "param": null}}',
    )
    url, asked = answering([busy, busy, (202, {}, b'{"id": "job-1"}')])
    pauses: list[float] = []
    server = Server(url, "key", pauses.append)
    answer = server.ask("POST", "/admin/experts", {}, headers={"Idempotency-Key": "k"}, again=True)
    server.close()
    assert answer == {"id": "job-1"}
    assert asked == [("POST", "k")] * 3
    assert pauses == [3.0, 3.0]


def test_what_may_not_be_sent_twice_is_sent_once(answering) -> None:
    url, asked = answering(
        [(503, {}, json.dumps({"error": {"message": "no", "code": "x", "param": "p"}}).encode())]
    )
    server = Server(url, "key", lambda _: None)
    with pytest.raises(RefusedError, match="no") as refused:
        server.ask("POST", "/admin/experts/a/rollback", {})
    server.close()
    assert (refused.value.status, refused.value.code, refused.value.param) == (503, "x", "p")
    assert len(asked) == 1


def test_a_server_of_another_kind_is_told_as_such(answering) -> None:
    url, _ = answering([(200, {}, b"<html>"), (404, {}, b"<html>")])
    server = Server(url, "", lambda _: None)
    with pytest.raises(UnreachableError, match="no twinserve's"):
        server.ask("GET", "/admin/experts")
    with pytest.raises(RefusedError, match="HTTP 404"):
        server.ask("GET", "/admin/experts")
    server.close()
