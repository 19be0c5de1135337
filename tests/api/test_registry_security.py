"""What an attacker, or a mistake, may try on the registry: each refused with its error, nothing of it served."""

import base64
import os
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi.routing import APIRoute
from safetensors.torch import load_file, save_file

from experts.registry.sources import SIGNATURE_NAME, digest_of_source, new_keys, sign
from tests.api.harness import ADMIN_KEY, Served, error_of, serving
from tests.fixtures.bombs import BOMBS
from tests.fixtures.tiny import TinyFamily, tiny_family, tiny_fine_tune, tiny_lora
from tests.fixtures.web import Site, web_site

ADMIN = {"X-API-Key": ADMIN_KEY}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
REFUSED = "refused"
"""Every registration here asks for that name, and no answer may ever come from it."""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> TinyFamily:
    return tiny_family(tmp_path_factory.mktemp("secured"), router=False)


@pytest.fixture(scope="module")
def root(own: TinyFamily, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder to register from."""
    folder = tmp_path_factory.mktemp("root")
    tiny_lora(folder / "lora", own.base, rank=4, seed=71)
    tiny_fine_tune(folder / "full", own.base, seed=73)
    return folder


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with web_site() as served:
        yield served


@pytest.fixture(scope="module")
def admin(own: TinyFamily, root: Path, site: Site) -> Iterator[Served]:
    """A server that may read some URLs of its own machine, whose operator allowed a metadata service by mistake."""
    here = f"http://localhost:{site.port}/"
    options = {
        "experts_root": root,
        "source_urls": (f"{here}ok/", "http://169.254.169.254/", "s3://models/"),
        "source_private": True,
    }
    with serving(own.bundle, admin_key=ADMIN_KEY, api_keys=("inference-key",), **options) as running:
        running.http.headers.update(ADMIN)
        yield running


@pytest.fixture(scope="module")
def strict(root: Path, site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, str]]:
    """A server without private sources that takes signed experts only, and the key that it trusts."""
    private, public = new_keys()
    folder = tmp_path_factory.mktemp("strict")
    (folder / "trusted").write_text(f"ann = {public}\n")
    urls = [
        f"http://{host}:{site.port}/"
        for host in ("localhost", "127.0.0.1", "2130706433", "0x7f000001", "[::1]")
    ]
    family = tiny_family(folder, experts=("alpha",), router=False)
    options = {"experts_root": root, "source_urls": tuple(urls), "signature_keys": folder / "trusted"}
    with serving(family.bundle, admin_key=ADMIN_KEY, **options) as running:
        running.http.headers.update(ADMIN)
        yield running, private


@pytest.fixture(autouse=True)
def _nothing_is_served_of_it(admin: Served) -> Iterator[None]:
    yield
    answer = admin.post(
        "/v1/completions", {"model": REFUSED, "prompt": "a"}, headers={"X-API-Key": "inference-key"}
    )
    assert (answer.status_code, error_of(answer)["code"]) == (404, "model_not_found")
    listed = [one["name"] for one in admin.http.get("/admin/experts").json()["data"] if one["loaded"]]
    assert [name for name in listed if name not in ("alpha", "beta", "gamma")] == []


def register(served: Served, **body: Any) -> httpx.Response:
    return served.post("/admin/experts?wait=60", {"name": REFUSED, **body})


def send(served: Served, files: dict[str, bytes]) -> httpx.Response:
    """Upload files in the order that they are given, then register; the first refusal, or what came of it."""
    upload_id = served.post("/admin/uploads", {}).json()["id"]
    try:
        for name, content in files.items():
            answer = served.http.put(f"/admin/uploads/{upload_id}/files/{name}", content=content)
            if answer.status_code != 200:
                return answer
        return register(served, upload=upload_id)
    finally:
        served.http.delete(f"/admin/uploads/{upload_id}")


def lora(root: Path, **changed: bytes | None) -> dict[str, bytes]:
    """The files of a sound LoRA but for what is changed: `config` or `weights`."""
    return {
        CONFIG: changed.get("config") or (root / "lora" / CONFIG).read_bytes(),
        WEIGHTS: changed.get("weights") or (root / "lora" / WEIGHTS).read_bytes(),
    }


def expect(answer: httpx.Response, status: int, code: str, *words: str, param: str | None = None) -> None:
    assert answer.status_code == status, answer.text
    error = error_of(answer)
    assert error["code"] == code, error
    for word in words:
        assert word in error["message"], error
    if param is not None:
        assert error["param"] == param, error


# -- folders of the server ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "..",
        "../..",
        "/",
        "/etc",
        "/etc/passwd",
        ".",
        "lora/../..",
        "lora/../../x",
        "//etc",
        "/proc/self/root/etc",
    ],
)
def test_a_path_that_leads_out_is_forbidden(admin: Served, path: str) -> None:
    expect(register(admin, path=path), 403, "path_not_allowed", "TWINSERVE_EXPERTS_ROOT", param="path")


@pytest.mark.parametrize("path", ["a\x00b", "a\nb", "mo\u202edel", "x" * 4097, ""])
def test_a_path_that_is_none_is_refused(admin: Served, path: str) -> None:
    expect(register(admin, path=path), 400, "invalid_request", param="path")


@pytest.mark.parametrize("path", ["~", "%2e%2e", "..\\..", "x" * 300, "ｌora", "lora\u200d"])
def test_a_path_that_only_looks_like_one_elsewhere_is_an_ordinary_name(admin: Served, path: str) -> None:
    answer = register(admin, path=path)
    assert (answer.status_code, error_of(answer)["param"]) in ((422, "path"), (400, "path"))


def linked_folder(root: Path, outside: Path) -> str:
    (root / "linked").symlink_to(outside, target_is_directory=True)
    return "linked"


def linked_file(root: Path, outside: Path) -> str:
    folder = root / "linked-file"
    folder.mkdir()
    (folder / CONFIG).write_bytes((root / "lora" / CONFIG).read_bytes())
    (folder / WEIGHTS).symlink_to(outside / WEIGHTS)
    return folder.name


def linked_deep(root: Path, outside: Path) -> str:
    folder = root / "linked-deep"
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "b" / "c").symlink_to("/etc")
    return folder.name


def circle(root: Path, outside: Path) -> str:
    folder = root / "circle"
    folder.mkdir()
    (folder / "self").symlink_to(folder / "self")
    return folder.name


@pytest.mark.parametrize("make", [linked_folder, linked_file, linked_deep])
def test_a_link_that_leads_out_is_forbidden(
    admin: Served, root: Path, tmp_path: Path, make: Callable[[Path, Path], str]
) -> None:
    for name in (CONFIG, WEIGHTS):
        (tmp_path / name).write_bytes((root / "lora" / name).read_bytes())
    expect(register(admin, path=make(root, tmp_path)), 403, "path_not_allowed", param="path")


def test_a_pipe_and_a_link_in_a_circle_block_nobody(admin: Served, root: Path, tmp_path: Path) -> None:
    folder = root / "pipe"
    folder.mkdir()
    os.mkfifo(folder / WEIGHTS)
    expect(register(admin, path="pipe"), 422, "expert_rejected", "neither a file nor a folder", param="path")
    answer = register(admin, path=circle(root, tmp_path))
    assert answer.status_code in (400, 403, 422), answer.text


# -- files that lie -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BOMBS)
def test_a_safetensors_bomb_in_an_upload_is_refused_before_any_work(
    admin: Served, root: Path, kind: str
) -> None:
    content, why = BOMBS[kind]
    jobs = len(admin.http.get("/admin/jobs?limit=1000").json()["data"])
    answer = send(admin, {CONFIG: lora(root)[CONFIG], WEIGHTS: content})
    expect(answer, 422, "expert_rejected", WEIGHTS, why, param="upload")
    assert len(admin.http.get("/admin/jobs?limit=1000").json()["data"]) == jobs


@pytest.mark.parametrize("kind", ["header of 2^63", "overlapping", "beyond the file"])
def test_a_safetensors_bomb_in_a_folder_or_behind_a_url_is_refused(
    admin: Served, root: Path, site: Site, kind: str
) -> None:
    content, why = BOMBS[kind]
    folder = root / f"bomb {kind}".replace(" ", "-").replace("^", "")
    folder.mkdir()
    for name, data in {**lora(root), WEIGHTS: content}.items():
        (folder / name).write_bytes(data)
    expect(register(admin, path=folder.name), 422, "expert_rejected", WEIGHTS, why)
    site.put(folder, "/ok/bomb")
    expect(register(admin, url=f"http://localhost:{site.port}/ok/bomb"), 422, "expert_rejected", WEIGHTS, why)


GGUF_BOMBS = {
    "empty": b"",
    "magic alone": b"GGUF",
    "no GGUF": b"x" * 100,
    "2^63 tensors": b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0),
    "2^63 fields": b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63),
    "a key of 2^63 bytes": b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63) + b"x" * 64,
    "an array of 2^62 numbers": b"GGUF"
    + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 4, 2**62)
    + b"x" * 64,
    "a tensor of 2^63 dimensions": b"GGUF" + struct.pack("<IQQQ1sI", 3, 1, 0, 1, b"t", 2**31) + b"x" * 64,
    "a tensor beyond the file": b"GGUF"
    + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 2**40, 0, 2**62)
    + b"x" * 64,
}


@pytest.mark.parametrize("kind", GGUF_BOMBS)
def test_a_gguf_that_lies_is_refused(admin: Served, kind: str) -> None:
    expect(send(admin, {"lora.gguf": GGUF_BOMBS[kind]}), 422, "expert_rejected", "lora.gguf")


@pytest.mark.parametrize(
    "report",
    [b"{}", b"[]", b"{", b'{"tensors": []}', b'{"auto_map": {"x": "y"}}', b'{"tensors": [{"name": "x"}]}'],
)
def test_a_ready_expert_that_fits_nothing_is_refused(admin: Served, tmp_path: Path, report: bytes) -> None:
    save_file({"model.nothing.weight.S": torch.ones(2)}, tmp_path / "expert.safetensors")
    weights = (tmp_path / "expert.safetensors").read_bytes()
    expect(send(admin, {"expert.json": report, "expert.safetensors": weights}), 422, "expert_rejected")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_none_names_its_tensor(
    admin: Served, root: Path, tmp_path: Path, value: float
) -> None:
    tensors = load_file(root / "lora" / WEIGHTS)
    name = sorted(tensors)[-1]
    tensors[name][0, -1] = value
    save_file(tensors, tmp_path / WEIGHTS)
    answer = send(admin, lora(root, weights=(tmp_path / WEIGHTS).read_bytes()))
    expect(answer, 422, "expert_rejected", name, "NaN or Inf")


def test_a_number_that_is_none_in_a_full_model_names_its_tensor(admin: Served, root: Path) -> None:
    folder = root / "full-nan"
    folder.mkdir()
    for file in (root / "full").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    answer = register(admin, path=folder.name)
    expect(answer, 422, "expert_rejected", "model.norm.weight", "NaN or Inf")
    failed = admin.http.get(f"/admin/experts/{REFUSED}/generations")
    if failed.status_code == 200:
        assert {one["state"] for one in failed.json()["data"]} == {"failed"}


@pytest.mark.parametrize("scale", [1e6, 1e30])
def test_weights_out_of_all_proportion_are_refused(
    admin: Served, root: Path, tmp_path: Path, scale: float
) -> None:
    tensors = {name: tensor * scale for name, tensor in load_file(root / "lora" / WEIGHTS).items()}
    save_file(tensors, tmp_path / WEIGHTS)
    answer = send(admin, lora(root, weights=(tmp_path / WEIGHTS).read_bytes()))
    assert (answer.status_code, error_of(answer)["code"]) == (422, "expert_rejected"), answer.text
    assert re.search(r"max_norm_ratio|NaN or Inf|not finite", error_of(answer)["message"])


# -- code and templates ---------------------------------------------------------------------------------


def pickled() -> bytes:
    import io

    buffer = io.BytesIO()
    torch.save({"a": torch.ones(2)}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("adapter_model.bin", "pickle"),
        ("pytorch_model.bin", "pickle"),
        ("model.pt", "pickle"),
        ("training.ckpt", "pickle"),
        ("weights.pkl", "pickle"),
        ("modeling_custom.py", "code"),
        ("custom.so", "code"),
        ("lora.zip", "archive"),
        ("lora.tar.gz", "archive"),
        ("chat_template.jinja", "chat template"),
        ("chat_template.json", "chat template"),
        ("tokenizer_config.json", "tokenizer"),
        ("tokenizer.json", "tokenizer"),
    ],
)
def test_pickles_code_archives_and_templates_are_not_taken_in(
    admin: Served, root: Path, name: str, word: str
) -> None:
    expect(send(admin, {**lora(root), name: pickled()}), 422, "expert_rejected", word, param="name")
    form = admin.http.post("/admin/uploads", files=[("file", (name, pickled()))])
    expect(form, 422, "expert_rejected", word, param="file")


def test_a_pickle_under_another_name_is_no_safetensors(admin: Served, root: Path) -> None:
    expect(send(admin, lora(root, weights=pickled())), 422, "expert_rejected", WEIGHTS, param="upload")


def test_a_folder_or_url_with_nothing_but_pickles_is_refused(admin: Served, root: Path, site: Site) -> None:
    folder = root / "pickled"
    folder.mkdir()
    (folder / CONFIG).write_bytes(lora(root)[CONFIG])
    (folder / "adapter_model.bin").write_bytes(pickled())
    expect(register(admin, path="pickled"), 422, "expert_rejected", "pickle")
    site.put(folder, "/ok/pickled")
    answer = register(admin, url=f"http://localhost:{site.port}/ok/pickled")
    expect(answer, 422, "expert_rejected", "pickled weights are not read")
    assert not any(path.endswith(".bin") for _, path in site.asked)


@pytest.mark.parametrize(
    "field",
    [
        '"auto_map": {"AutoModelForCausalLM": "evil.Model"}',
        '"trust_remote_code": true',
        '"nested": {"auto_map": {"AutoConfig": "evil.Config"}}',
        '"chat_template": "{{ cycler.__init__.__globals__ }}"',
    ],
)
def test_code_and_templates_in_a_config_are_refused_wherever_it_comes_from(
    admin: Served, root: Path, site: Site, field: str
) -> None:
    config = lora(root)[CONFIG].replace(b"{", f"{{{field},".encode(), 1)
    word = field.split('"')[3 if "nested" in field else 1]
    expect(send(admin, lora(root, config=config)), 422, "expert_rejected", word, param="upload")
    folder = root / f"config-{base64.b16encode(os.urandom(4)).decode()}"
    folder.mkdir()
    for name, data in lora(root, config=config).items():
        (folder / name).write_bytes(data)
    expect(register(admin, path=folder.name), 422, "expert_rejected", word)
    site.put(folder, "/ok/config")
    expect(register(admin, url=f"http://localhost:{site.port}/ok/config/"), 422, "expert_rejected", word)


# -- URLs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{port}/ok/",
        "http://[::1]:{port}/ok/",
        "http://2130706433:{port}/ok/",
        "http://0x7f000001:{port}/ok/",
        "http://0177.0.0.1:{port}/ok/",
        "http://127.1:{port}/ok/",
        "http://localhost:{port}/secret/",
        "http://localhost:{port}/okay/",
        "http://localhost:{port}/ok/../secret/",
        "http://localhost:{port}/ok/%2e%2e/secret/",
        "http://localhost:{port}/ok//etc",
        "http://localhost:{port}@evil.example/ok/",
        "http://user:password@localhost:{port}/ok/",
        "http://localhost:{port}/ok/?token=secret",
        "http://localhost:{port}/ok/#x",
        "http://localhost:{port}\\@evil.example/ok/",
        "http://localhost:1/ok/",
        "https://localhost:{port}/ok/",
        "http://localhost.evil.example:{port}/ok/",
        "http://loc\u0430lhost:{port}/ok/",
        "http://localhost:{port}/ok/\u2026",
        "file:///etc/passwd",
        "local:///etc",
        "ftp://localhost/ok/",
        "gopher://localhost:{port}/ok/",
        "s3://other/models",
        "s3://models/../other",
        "s3::http://localhost:{port}/ok/",
        "//localhost:{port}/ok/",
        "localhost:{port}/ok/",
        "http://" + "x" * 3000,
    ],
)
def test_a_url_outside_the_allow_list_is_refused_before_any_work(admin: Served, site: Site, url: str) -> None:
    asked = len(site.asked)
    expect(register(admin, url=url.replace("{port}", str(site.port))), 403, "source_not_allowed", param="url")
    assert len(site.asked) == asked


def test_a_metadata_service_stays_closed_even_where_it_is_on_the_list(admin: Served) -> None:
    answer = register(admin, url="http://169.254.169.254/latest/meta-data/iam/")
    expect(answer, 403, "source_not_allowed", "169.254.169.254")


@pytest.mark.parametrize(
    "target",
    [
        "http://169.254.169.254/latest/meta-data/",
        "http://127.0.0.1:{port}/secret/expert.json",
        "http://[::1]:{port}/secret/expert.json",
        "http://2130706433:{port}/secret/expert.json",
        "http://0x7f.1:{port}/secret/expert.json",
        "http://localhost:{port}/secret/expert.json",
        "/secret/expert.json",
        "//127.0.0.1:{port}/secret/expert.json",
        "file:///etc/passwd",
        "s3://models/expert.json",
        "/ok/circle/expert.json",
    ],
)
def test_a_redirect_to_anywhere_else_is_refused(admin: Served, site: Site, target: str) -> None:
    site.files["/secret/expert.json"] = b"{}"
    site.redirects["/ok/circle/expert.json"] = target.replace("{port}", str(site.port))
    answer = register(admin, url=f"http://localhost:{site.port}/ok/circle/")
    expect(answer, 403, "source_not_allowed")
    assert not any("/secret/" in path for _, path in site.asked)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "2130706433", "0x7f000001", "[::1]"])
def test_a_name_on_the_list_that_leads_to_this_machine_is_refused(
    strict: tuple[Served, str], site: Site, host: str
) -> None:
    asked = len(site.asked)
    answer = register(strict[0], url=f"http://{host}:{site.port}/ok/lora/")
    assert answer.status_code in (403, 422), answer.text
    if answer.status_code == 422:  # where this machine has no such address at all
        assert "cannot be resolved" in error_of(answer)["message"]
    else:
        expect(answer, 403, "source_not_allowed", "source_private")
    assert len(site.asked) == asked


def test_no_url_is_read_where_none_is_allowed(server: Served) -> None:
    answer = server.post("/admin/experts", {"name": REFUSED, "url": "https://models.example/"}, headers=ADMIN)
    expect(answer, 403, "source_not_allowed", "TWINSERVE_SOURCE_URLS", param="url")


# -- names ----------------------------------------------------------------------------------------------

NAMES = [
    "", " ", ".", "..", "../x", "a/b", "/etc/passwd", "a\\b", "a\x00", "a\n", "-a", "a-", ".a", "a.", "_a",
    "é", "ａlpha", "аlpha", "a\u200db", "mo\u202edel", "a b", "a%2fb", "con:", "a;b", "$(id)", "{{x}}", "<b>",
    "x" * 65, "x" * 100_000, "shared", "tiny",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name[:20]))
def test_an_expert_cannot_have_a_name_that_is_a_path_or_looks_like_another(admin: Served, name: str) -> None:
    expect(register(admin, name=name, path="lora"), 400, "invalid_request", param="name")


@pytest.mark.parametrize(
    "name",
    [
        "..%2F..%2Fetc%2Fpasswd",
        "%2e%2e",
        "a%2Fb.safetensors",
        "%00",
        "a%0A.safetensors",
        "%E2%80%AE.gguf",
        "x" * 200,
    ],
)
def test_an_uploaded_file_cannot_have_one_either(admin: Served, name: str) -> None:
    upload_id = admin.post("/admin/uploads", {}).json()["id"]
    try:
        answer = admin.http.put(f"/admin/uploads/{upload_id}/files/{name}", content=b"x")
        assert answer.status_code in (403, 404), answer.text
        if answer.status_code == 403:
            assert error_of(answer)["param"] == "name"
        assert admin.http.get(f"/admin/uploads/{upload_id}").json()["files"] == []
    finally:
        admin.http.delete(f"/admin/uploads/{upload_id}")


@pytest.mark.parametrize("upload_id", ["..", "../..", "upload-1", "x" * 128, "upload-" + "0" * 24, "é"])
def test_an_upload_that_nobody_began_is_not_found(admin: Served, upload_id: str) -> None:
    expect(register(admin, upload=upload_id), 404, "record_not_found", param="upload")


# -- signatures -----------------------------------------------------------------------------------------


def test_only_what_a_trusted_key_vouches_for_is_registered(
    strict: tuple[Served, str], root: Path, tmp_path: Path
) -> None:
    served, key = strict
    expect(register(served, path="lora"), 422, "signature_rejected", "not signed", param="signature")
    expect(send(served, lora(root)), 422, "signature_rejected", "not signed", param="signature")
    digest = digest_of_source(root / "lora")
    for wrong in (sign(new_keys()[0], digest), base64.b64encode(bytes(64)).decode(), "%%%"):
        expect(register(served, path="lora", signature=wrong), 422, "signature_rejected", param="signature")
    other = tiny_lora(tmp_path / "other", Path(root / "full"), rank=2, seed=5)
    elsewhere = sign(key, digest_of_source(other))
    expect(register(served, path="lora", signature=elsewhere), 422, "signature_rejected", "does not fit")
    beside = sign(key, digest).encode()
    changed = lora(root, config=lora(root)[CONFIG] + b"\n")
    expect(send(served, {**changed, SIGNATURE_NAME: beside}), 422, "signature_rejected", "does not fit")
    signed = register(served, name="signed", path="lora", signature=sign(key, digest))
    assert signed.status_code == 201, signed.text
    assert signed.json()["report"]["signed_by"] == "ann"
    sent = send(served, {**lora(root), SIGNATURE_NAME: beside})
    assert sent.status_code == 201, sent.text


# -- keys -----------------------------------------------------------------------------------------------


def admin_routes(served: Served) -> list[tuple[str, str]]:
    """(method, path) of every route of the app below /admin, and of those elsewhere that change experts."""
    found = []
    for route in served.app.routes:
        assert isinstance(route, APIRoute) or not route.path.startswith("/admin")
        if isinstance(route, APIRoute) and (
            route.path.startswith("/admin") or route.path.endswith("load_lora_adapter")
        ):
            path = re.sub(r"\{(\w+)(?::\w+)?\}", "x", route.path)
            found += [(method, path) for method in sorted(route.methods)]
    return found


@pytest.mark.parametrize("key", [None, "wrong", "inference-key", ADMIN_KEY[:-1], f"{ADMIN_KEY}x"])
def test_no_admin_route_answers_without_the_admin_key(admin: Served, key: str | None) -> None:
    given = {} if key is None else {"X-API-Key": key}
    routes = admin_routes(admin)
    assert len(routes) > 25
    assert {path for _, path in routes} >= {
        "/admin/experts",
        "/admin/uploads",
        "/admin/jobs/x",
        "/v1/load_lora_adapter",
    }
    variants = (lambda path: path, lambda path: f"{path}/", lambda path: f"{path}%0A")
    with httpx.Client(base_url=admin.url, headers=given, timeout=30) as http:
        for method, path in routes:
            for variant in variants:
                answer = http.request(method, variant(path), content=b"{}")
                if path.startswith("/v1/") and variant(path) != path and answer.status_code == 404:
                    continue  # no such route
                assert answer.status_code == 401, (method, variant(path), answer.text)
                if method != "HEAD":
                    assert error_of(answer)["code"] == "invalid_api_key"


def test_without_an_admin_key_there_is_no_admin(tmp_path: Path) -> None:
    family = tiny_family(tmp_path, experts=("alpha",), router=False)
    with serving(family.bundle) as closed:
        for method, path in admin_routes(closed):
            answer = closed.http.request(method, path, headers=ADMIN, content=b"{}")
            assert answer.status_code == 403, (method, path)
            if method != "HEAD":
                assert error_of(answer)["code"] == "admin_disabled"
