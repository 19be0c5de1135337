import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest

from service.keys import digest_of
from service.serve import assemble
from service.settings import Settings
from tests.api.harness import ADMIN_KEY, Served, error_of, serving
from tests.fixtures.tiny import TinyFamily

KEYS = ("first-key", "second-key")
OPEN = {"/health", "/health/live", "/health/ready", "/version"}
"""Whatever else the app may come to answer is closed."""


@pytest.fixture(scope="module")
def locked(family: TinyFamily, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"# clients\nkey-of-the-file\nalice = sha256:{digest_of('hashed-key').hex()}\n\n")
    with serving(family.bundle, api_keys=",".join(KEYS), api_keys_file=keys, admin_key=ADMIN_KEY) as served:
        yield served


def routes(bundle: Path) -> list[tuple[str, str]]:
    """Every method and path that the app answers."""
    server, runtime = assemble(Settings(bundle=bundle, dtype="float32"), lambda *_: None)
    runtime.close()
    found = []
    for route in server.config.app.routes:  # type: ignore[union-attr]
        methods = getattr(route, "methods", None)
        assert methods, f"{route} is not an HTTP route; is it behind the check?"
        path = re.sub(r"{\w+(:\w+)?}", "alpha", route.path)
        found += [(method, path) for method in methods]
    return found


def test_every_route_but_probes_and_version_wants_a_key(locked: Served, family: TinyFamily) -> None:
    every = routes(family.bundle)
    assert len(every) > 12
    for method, path in every:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"X-API-Key": ""}):
            answer = locked.http.request(method, path, headers=headers)
            if path in OPEN:
                assert answer.status_code in (200, 405), path
            else:
                assert answer.status_code == 401, (method, path)
                assert method == "HEAD" or error_of(answer)["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"] == "Bearer"


def spelt(path: str) -> list[str]:
    """What a careless server might take for the same path."""
    return [
        f"{path}/",
        f"/{path}",
        f"/.{path}",
        f"/health/..{path}",
        f"/version/%2e%2e{path}",
        "".join(f"%{byte:02x}" if byte != ord("/") else "/" for byte in path.encode()),
        f"/{quote(path[1:], safe='')}",
        f"{path}?/version",
        f"{path};/health",
        *(f"{path}{end}" for end in ("%0a", "%0d", "%0a%0a", "%00", "%20", "%e2%80%a8")),
        path.upper(),
    ]


def test_no_other_spelling_or_method_of_a_route_slips_by(locked: Served, family: TinyFamily) -> None:
    for _, path in routes(family.bundle):
        if path in OPEN:
            continue
        for other in (path, *spelt(path)):
            for method in (
                ("GET", "HEAD", "OPTIONS", "POST", "PROPFIND") if other == path else ("GET", "POST")
            ):
                url = httpx.URL(locked.url).copy_with(raw_path=other.encode())
                answer = locked.http.request(method, url)
                assert answer.status_code == 401, (method, other)


def test_metrics_want_a_key_of_either_kind_unless_they_are_open(locked: Served, family: TinyFamily) -> None:
    assert locked.http.get("/metrics").status_code == 401
    for key in (*KEYS, ADMIN_KEY):
        assert locked.http.get("/metrics", headers={"X-API-Key": key}).status_code == 200
    with serving(family.bundle, api_keys="a-key", metrics_open=True) as scraped:
        assert scraped.http.get("/metrics").status_code == 200
        assert scraped.http.get("/v1/models").status_code == 401


def test_what_does_not_exist_wants_a_key_too(locked: Served) -> None:
    for path in ("/v2/anything", "//v1/models", "/V1/models", "/v1/../metrics/x", "/health/", "/metricsx"):
        assert locked.http.get(path).status_code == 401, path


@pytest.mark.parametrize("key", [*KEYS, "key-of-the-file", "hashed-key"])
def test_each_key_opens_v1_in_either_header(locked: Served, key: str) -> None:
    for headers in (
        {"Authorization": f"Bearer {key}"},
        {"authorization": f"bearer {key}"},
        {"X-API-Key": key},
    ):
        assert locked.http.get("/v1/models", headers=headers).status_code == 200


def test_keys_do_not_cross_between_v1_and_admin(locked: Served) -> None:
    admin, user = {"X-API-Key": ADMIN_KEY}, {"X-API-Key": KEYS[0]}
    assert locked.http.get("/admin/experts", headers=admin).status_code == 200
    assert locked.http.get("/v1/models", headers=admin).status_code == 401
    assert locked.http.get("/admin/experts", headers=user).status_code == 401


def test_what_changes_experts_opens_to_no_inference_key_however_it_is_spelt(locked: Served) -> None:
    user = {"X-API-Key": KEYS[0]}
    for path, body in (
        ("/v1/load_lora_adapter", {"lora_name": "alpha", "lora_path": "alpha", "load_inplace": True}),
        ("/v1/unload_lora_adapter", {"lora_name": "alpha"}),
        ("/lora-adapters", [{"id": 0, "scale": 0.5}]),
    ):
        for other in (path, *spelt(path)):
            url = httpx.URL(locked.url).copy_with(raw_path=other.encode())
            answer = locked.http.request("POST", url, headers=user, json=body)
            assert answer.status_code in (401, 404), other
        url = httpx.URL(locked.url).copy_with(raw_path=f"{path}%0a".encode())
        assert locked.http.request("POST", url, headers=user, json=body).status_code == 401
    served = locked.http.get("/v1/models", headers=user).json()["data"]
    assert "alpha" in {model["id"] for model in served}


@pytest.mark.parametrize(
    "header",
    [
        "Basic Zmlyc3Qta2V5",
        "first-key",
        "Bearer",
        "Bearer first-key x",
        "Bearer firSt-key",
        "Bearer alice",
        f"Bearer sha256:{digest_of('hashed-key').hex()}",
        f"Bearer {digest_of('hashed-key').hex()}",
    ],
)
def test_other_forms_of_a_key_are_refused(locked: Served, header: str) -> None:
    assert locked.http.get("/v1/models", headers={"Authorization": header}).status_code == 401


def test_a_body_is_not_read_before_the_key_is_checked(locked: Served) -> None:
    answer = locked.http.post("/v1/completions", content=b"x" * 100_000_0)
    assert answer.status_code == 401


def test_without_keys_v1_is_open_and_admin_is_off(family: TinyFamily) -> None:
    with serving(family.bundle) as open_server:
        assert open_server.http.get("/v1/models").status_code == 200
        for headers in ({}, {"X-API-Key": "anything"}):
            answer = open_server.http.get("/admin/experts", headers=headers)
            assert answer.status_code == 403
            assert error_of(answer)["code"] == "admin_disabled"
            assert "TWINSERVE_ADMIN_KEY" in error_of(answer)["message"]
