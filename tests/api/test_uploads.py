"""Files reach the disk as they come, in pieces or as a form, and become an expert by the upload's id."""

import contextlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.harness import ADMIN_KEY, Served, error_of, eventually, serving
from tests.fixtures.tiny import TinyFamily, tiny_family, tiny_lora

ADMIN = {"X-API-Key": ADMIN_KEY}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LIMIT = 3_000_000


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> TinyFamily:
    """A family whose experts these tests change."""
    return tiny_family(tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="module")
def lora(own: TinyFamily, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tiny_lora(tmp_path_factory.mktemp("sources") / "lora", own.base, rank=4, seed=91)
    return {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}


@pytest.fixture(scope="module")
def served(own: TinyFamily) -> Iterator[Served]:
    bounds = {"max_source_bytes": LIMIT, "max_body_bytes": 2048, "max_uploads": 4, "body_seconds": 5.0}
    with serving(own.bundle, admin_key=ADMIN_KEY, **bounds) as running:
        running.http.headers.update(ADMIN)
        yield running


@pytest.fixture(autouse=True)
def _none_left(served: Served) -> Iterator[None]:
    yield
    for upload in served.http.get("/admin/uploads").json()["data"]:
        assert eventually(lambda upload=upload: gone(served, upload["id"]))


def gone(served: Served, upload_id: str) -> bool:
    return served.http.delete(f"/admin/uploads/{upload_id}").status_code in (200, 404)


def begin(served: Served) -> str:
    answer = served.post("/admin/uploads", {})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def put(served: Served, upload_id: str, name: str, content: Any, offset: int | None = None) -> httpx.Response:
    query = {} if offset is None else {"offset": offset}
    return served.http.put(f"/admin/uploads/{upload_id}/files/{name}", content=content, params=query)


def register(served: Served, **body: Any) -> httpx.Response:
    return served.post("/admin/experts?wait=60", body)


def test_pieces_become_an_expert(served: Served, lora: dict[str, bytes]) -> None:
    upload_id = begin(served)
    assert put(served, upload_id, CONFIG, lora[CONFIG]).json() == {"name": CONFIG, "bytes": len(lora[CONFIG])}
    half = len(lora[WEIGHTS]) // 2
    assert put(served, upload_id, WEIGHTS, lora[WEIGHTS][:half]).json()["bytes"] == half
    known = served.http.get(f"/admin/uploads/{upload_id}").json()
    assert known["files"] == [
        {"name": CONFIG, "bytes": len(lora[CONFIG])},
        {"name": WEIGHTS, "bytes": half},
    ]
    assert (known["state"], known["bytes"]) == ("open", len(lora[CONFIG]) + half)
    unfinished = register(served, name="sent", upload=upload_id)
    assert unfinished.status_code == 422, unfinished.text
    assert WEIGHTS in error_of(unfinished)["message"]
    assert put(served, upload_id, WEIGHTS, lora[WEIGHTS][half:], half).json()["bytes"] == len(lora[WEIGHTS])
    made = register(served, name="sent", upload=upload_id)
    assert made.status_code == 201, made.text
    assert served.complete(model="sent", max_tokens=2)["routing"]["generations"] == {"sent": 1}
    assert served.http.get(f"/admin/uploads/{upload_id}").json()["state"] == "registered"
    late = put(served, upload_id, CONFIG, b"x", len(lora[CONFIG]))
    assert (late.status_code, error_of(late)["code"]) == (409, "wrong_state")
    again = register(served, name="again", upload=upload_id)
    assert again.status_code == 201, again.text
    text = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
    assert (
        served.complete(model="sent", **text)["choices"][0]["text"]
        == served.complete(model="again", **text)["choices"][0]["text"]
    )


def test_a_request_whose_answer_was_lost_is_answered_again_though_its_upload_is_gone(
    served: Served, lora: dict[str, bytes]
) -> None:
    upload_id = begin(served)
    for name, content in lora.items():
        assert put(served, upload_id, name, content).status_code == 200
    body, headers = {"name": "lost", "upload": upload_id}, {"Idempotency-Key": "lost-answer"}
    first = served.post("/admin/experts?wait=60", body, headers=headers)
    assert first.status_code == 201, first.text
    assert served.http.delete(f"/admin/uploads/{upload_id}").status_code == 200
    again = served.post("/admin/experts?wait=60", body, headers=headers)
    assert (again.status_code, again.json()["job"]) == (201, first.json()["job"])
    other = served.post("/admin/experts", {**body, "activate": False}, headers=headers)
    assert other.status_code in (404, 422)


def test_a_form_is_an_upload_at_once(served: Served, lora: dict[str, bytes]) -> None:
    files = [("file", (name, content)) for name, content in lora.items()]
    answer = served.http.post("/admin/uploads", files=files)
    assert answer.status_code == 201, answer.text
    upload = answer.json()
    assert {file["name"]: file["bytes"] for file in upload["files"]} == {
        name: len(content) for name, content in lora.items()
    }
    made = register(served, name="formed", upload=upload["id"])
    assert made.status_code == 201, made.text


def test_files_may_be_larger_than_any_other_body_and_not_larger_than_a_source(served: Served) -> None:
    upload_id = begin(served)
    assert put(served, upload_id, WEIGHTS, b"x" * 1_000_000).status_code == 200
    within = put(
        served, upload_id, WEIGHTS, (b"x" * 100_000 for _ in range(20)), 1_000_000
    )  # without a length
    assert within.json() == {"name": WEIGHTS, "bytes": LIMIT}
    for content in (b"x", (b"x" for _ in range(1))):
        beyond = put(served, upload_id, WEIGHTS, content, LIMIT)
        assert (beyond.status_code, error_of(beyond)["code"]) == (413, "body_too_large")
        assert "max_source_bytes" in error_of(beyond)["message"]
    announced = put(served, upload_id, CONFIG, b"x" * (LIMIT + 2**20 + 1))
    assert (announced.status_code, error_of(announced)["code"]) == (413, "body_too_large")
    assert served.http.get(f"/admin/uploads/{upload_id}").json()["bytes"] == LIMIT
    ordinary = served.http.post(
        "/admin/uploads", content=b" " * 4000, headers={"Content-Type": "application/json"}
    )
    assert (ordinary.status_code, "max_body_bytes" in error_of(ordinary)["message"]) == (413, True)


def test_a_part_that_goes_on_elsewhere_is_told_where(served: Served) -> None:
    upload_id = begin(served)
    put(served, upload_id, CONFIG, b"12345")
    wrong = put(served, upload_id, CONFIG, b"6", 4)
    error = error_of(wrong)
    assert (wrong.status_code, error["code"], error["param"]) == (409, "offset_conflict", "offset")
    assert "ends at 5" in error["message"]
    for offset in ("-1", "x", "1.5", "9" * 400):
        answer = served.http.put(f"/admin/uploads/{upload_id}/files/{CONFIG}?offset={offset}", content=b"x")
        assert (answer.status_code, error_of(answer)["param"]) == (400, "offset")
    removed = served.http.delete(f"/admin/uploads/{upload_id}/files/{CONFIG}")
    assert removed.json()["files"] == []
    assert put(served, upload_id, CONFIG, b"anew", 0).json()["bytes"] == 4


@contextlib.contextmanager
def begun(served: Served, upload_id: str, name: str, length: int) -> Iterator[socket.socket]:
    """A connection whose PUT the server has begun to take, before the first byte of its body."""
    url = httpx.URL(served.url)
    with socket.create_connection((url.host, url.port), timeout=30) as raw:
        head = (
            f"PUT /admin/uploads/{upload_id}/files/{name} HTTP/1.1\r\nHost: x\r\nX-API-Key: {ADMIN_KEY}\r\n"
        )
        raw.sendall(f"{head}Content-Length: {length}\r\nExpect: 100-continue\r\n\r\n".encode())
        assert raw.recv(1000).startswith(b"HTTP/1.1 100")
        yield raw


def test_a_client_that_hangs_up_goes_on_where_it_was(served: Served) -> None:
    upload_id = begin(served)
    content = bytes(range(250)) * 8000
    with begun(served, upload_id, WEIGHTS, LIMIT) as raw:
        raw.sendall(content)
    assert eventually(lambda: sizes(served, upload_id).get(WEIGHTS, 0) >= 2**20)
    there = sizes(served, upload_id)[WEIGHTS]
    assert there <= len(content)
    assert put(served, upload_id, WEIGHTS, content[there:], there).json()["bytes"] == len(content)


def sizes(served: Served, upload_id: str) -> dict[str, int]:
    upload = served.http.get(f"/admin/uploads/{upload_id}").json()
    return {file["name"]: file["bytes"] for file in upload["files"]}


def test_a_second_writer_of_a_file_is_refused_while_the_first_writes(served: Served) -> None:
    upload_id = begin(served)
    with begun(served, upload_id, WEIGHTS, 11) as raw:
        for change in (
            put(served, upload_id, WEIGHTS, b"x", 0),
            served.http.delete(f"/admin/uploads/{upload_id}"),
            register(served, name="x", upload=upload_id),
        ):
            assert (change.status_code, error_of(change)["code"]) == (409, "wrong_state"), change.text
        assert put(served, upload_id, CONFIG, b"{}").status_code == 200
        raw.sendall(b"firstsecond")
        assert raw.recv(65536).startswith(b"HTTP/1.1 200")
    assert sizes(served, upload_id) == {CONFIG: 2, WEIGHTS: 11}


def test_a_body_that_stands_still_is_ended_and_what_came_counts(served: Served) -> None:
    upload_id = begin(served)
    with begun(served, upload_id, CONFIG, 100) as raw:
        raw.sendall(b"abc")
        answer = raw.recv(65536)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"body_seconds" in answer
    assert eventually(lambda: sizes(served, upload_id) == {CONFIG: 3})


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"[]", "application/json", 400),
        (b'{"name": "x"}', "application/json", 400),
        (b"x", "text/plain", 415),
        (b"x", "multipart/form-data", 400),
        (b"x", "multipart/form-data; boundary=b", 400),
        (b"--b\r\n", "multipart/form-data; boundary=b", 400),
        (b"--b--\r\n", "multipart/form-data; boundary=b", 400),
        (
            b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\nfield\r\n--b--\r\n',
            "multipart/form-data; boundary=b",
            400,
        ),
        (b"--b\r\nX: " + b"y" * 9000 + b"\r\n\r\n\r\n--b--\r\n", "multipart/form-data; boundary=b", 400),
        (
            b'--b\r\nContent-Disposition: form-data; name="f"; filename="config.json"\r\n\r\n{}\r\n',
            "multipart/form-data; boundary=b",
            400,
        ),
        (
            b'--b\r\nContent-Disposition: form-data; name="f"; filename="config.json"\r\n'
            b"Content-Encoding: gzip\r\n\r\n{}\r\n--b--\r\n",
            "multipart/form-data; boundary=b",
            400,
        ),
        (b"--" + b"b" * 300 + b"--\r\n", "multipart/form-data; boundary=" + "b" * 300, 400),
    ],
)  # fmt: skip
def test_what_is_no_upload_leaves_none(served: Served, body: bytes, kind: str, status: int) -> None:
    answer = served.http.post("/admin/uploads", content=body, headers={"Content-Type": kind})
    assert answer.status_code == status, answer.text
    assert error_of(answer)["type"] == "invalid_request_error"
    assert served.http.get("/admin/uploads").json()["data"] == []


def test_a_form_with_one_bad_file_leaves_nothing(served: Served, lora: dict[str, bytes]) -> None:
    for bad in ("pytorch_model.bin", "../../x.safetensors", CONFIG):
        files = [("file", (CONFIG, lora[CONFIG])), ("file", (bad, b"x"))]
        answer = served.http.post("/admin/uploads", files=files)
        assert answer.status_code in (403, 409, 422), answer.text
        assert served.http.get("/admin/uploads").json()["data"] == []


def test_uploads_are_counted_and_found_again_after_a_restart(tmp_path: Path) -> None:
    family = tiny_family(tmp_path, experts=("alpha",), router=False)
    with serving(family.bundle, admin_key=ADMIN_KEY, max_uploads=2) as first:
        first.http.headers.update(ADMIN)
        ids = [begin(first), begin(first)]
        put(first, ids[0], CONFIG, json.dumps({"peft_type": "LORA"}).encode())
        full = first.post("/admin/uploads", {})
        assert (full.status_code, error_of(full)["code"]) == (429, "queue_full")
        assert "max_uploads" in error_of(full)["message"]
    with serving(family.bundle, admin_key=ADMIN_KEY, max_uploads=2) as second:
        second.http.headers.update(ADMIN)
        assert sorted(one["id"] for one in second.http.get("/admin/uploads").json()["data"]) == sorted(ids)
        assert sizes(second, ids[0]) == {CONFIG: 21}
        assert put(second, ids[0], CONFIG, b" ", 21).json()["bytes"] == 22
        for missing in ("upload-" + "0" * 24, "nothing", "..%2F..%2Fetc"):
            answer = second.http.get(f"/admin/uploads/{missing}")
            assert answer.status_code == 404, answer.text
