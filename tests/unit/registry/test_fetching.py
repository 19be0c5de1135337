"""A URL gives the files of one fine-tune, from where the policy allows and from nowhere else."""

import json
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from experts.errors import (
    CheckpointError,
    SourceError,
    SourceTooLargeError,
    SourceUnavailableError,
)
from experts.registry.sources import FetchPolicy, fetch, parse_prefixes
from experts.registry.sources.addresses import checked_address, system_resolver
from experts.registry.sources.policy import parse
from tests.fixtures.object_store import ObjectStoreServer
from tests.fixtures.object_store import object_store as object_store
from tests.fixtures.web import Site, certificate, web_site

LORA = {"adapter_config.json": b'{"peft_type": "LORA"}', "adapter_model.safetensors": b"weights"}


@pytest.fixture
def site() -> Iterator[Site]:
    with web_site() as served:
        yield served


def policy(*prefixes: str, **options: object) -> FetchPolicy:
    return FetchPolicy(parse_prefixes(prefixes), **options)  # type: ignore[arg-type]


def loopback(host: str, port: int) -> list[str]:
    return ["127.0.0.1"]


def got(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_folder_url_gives_the_known_files_and_no_others(site: Site, tmp_path: Path) -> None:
    lora = {**LORA, "README.md": b"read me", "adapter_model.bin": b"pickle", "tokenizer.json": b"{}"}
    site.files = {f"/org/lora/{name}": content for name, content in lora.items()}
    base = f"http://models.test:{site.port}/org/"
    seen: list[str] = []
    fetch(
        f"{base}lora",
        tmp_path,
        policy(base, private=True),
        lambda name, nbytes: seen.append(f"{name} {nbytes}"),
        resolve=loopback,
    )
    assert got(tmp_path) == LORA
    assert {host for host, _ in site.asked} == {f"models.test:{site.port}"}
    assert seen[-1] == "adapter_model.safetensors 28"


def test_shards_come_by_their_index(site: Site, tmp_path: Path) -> None:
    shards = {f"model-0000{i}-of-00002.safetensors": f"shard {i}".encode() for i in (1, 2)}
    index = json.dumps({"weight_map": dict(zip("ab", shards, strict=True))}).encode()
    model = {"config.json": b"{}", "model.safetensors.index.json": index, **shards}
    site.files = {f"/{name}": content for name, content in model.items()}
    fetch(
        f"http://m.test:{site.port}",
        tmp_path,
        policy(f"http://m.test:{site.port}", private=True),
        resolve=loopback,
    )
    assert got(tmp_path) == model


@pytest.mark.parametrize(
    "shard", ["../../etc/passwd", "http://169.254.169.254/x", "adapter_model.bin", "x.gguf"]
)
def test_an_index_cannot_name_anything_else(site: Site, tmp_path: Path, shard: str) -> None:
    index = json.dumps({"weight_map": {"a": shard}}).encode()
    site.files = {"/m/config.json": b"{}", "/m/model.safetensors.index.json": index}
    with pytest.raises(CheckpointError, match="shard"):
        fetch(
            f"http://m.test:{site.port}/m/",
            tmp_path,
            policy(f"http://m.test:{site.port}/", private=True),
            resolve=loopback,
        )
    assert not any("passwd" in path for _, path in site.asked)


def test_a_file_url_means_its_folder_or_the_gguf_alone(site: Site, tmp_path: Path) -> None:
    site.files = {f"/l/{name}": content for name, content in {**LORA, "small.gguf": b"GGUF"}.items()}
    base = f"http://m.test:{site.port}"
    for url, expected in (
        (f"{base}/l/adapter_model.safetensors", LORA),
        (f"{base}/l/small.gguf", {"small.gguf": b"GGUF"}),
    ):
        target = tmp_path / str(len(url))
        target.mkdir()
        fetch(url, target, policy(base, private=True), resolve=loopback)
        assert got(target) == expected


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://models.test/other/", "not among"),
        ("http://models.test/orgs/", "not among"),
        ("https://models.test/org/", "not among"),
        ("http://models.test:81/org/", "not among"),
        ("http://models.test.evil.example/org/", "not among"),
        ("http://evil.example/models.test/org/", "not among"),
        ("http://models.test@evil.example/org/", "credentials"),
        ("http://user:password@models.test/org/", "credentials"),
        ("http://models.test/org/../secret/", "path"),
        ("http://models.test/org/%2e%2e/secret/", "path"),
        ("http://models.test/org/..%2fsecret", "path"),
        ("http://models.test/org//x", "path"),
        ("http://models.test/org/?X-Amz-Signature=1", "query"),
        ("http://models.test/org/#x", "fragment"),
        ("http://models.test\\@evil.example/org/", "ASCII"),
        ("http://mödels.test/org/", "ASCII"),
        ("http://models.test/org/a b", "ASCII"),
        ("http://models.test/org/\n", "ASCII"),
        ("http://models.test:99999/org/", "read"),
        ("file:///etc/passwd", "scheme"),
        ("local:///etc/passwd", "scheme"),
        ("ftp://models.test/org/", "scheme"),
        ("gopher://models.test/org/", "scheme"),
        ("memory://models.test/org/", "scheme"),
        ("simplecache::s3://bucket/x", "ASCII"),
        ("http://2130706433/", "not among"),
        ("http://0x7f000001/", "not among"),
        ("http://0177.0.0.1/", "not among"),
        ("http://[::1]/", "not among"),
        ("http://169.254.169.254/latest/meta-data/", "not among"),
        ("http://" + "x" * 3000, "limit"),
        ("", "ASCII"),
        ("/etc/passwd", "ASCII"),
    ],
)
def test_a_url_outside_the_allow_list_is_never_asked_for(tmp_path: Path, url: str, why: str) -> None:
    def never(host: str, port: int) -> list[str]:
        raise AssertionError(f"{host} was resolved")

    with pytest.raises(SourceError, match=why):
        fetch(url, tmp_path, policy("http://models.test/org/", private=True), resolve=never)


def test_nothing_is_allowed_without_a_list(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="SOURCE_URLS"):
        fetch("https://models.test/", tmp_path, policy())


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "100.64.0.1",
        "224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fc00::1", "fd00:ec2::254", "::ffff:127.0.0.1",
        "::ffff:10.0.0.1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "100.100.100.200",
    ],
)  # fmt: skip
def test_a_name_that_leads_to_a_private_address_is_refused_even_among_public_ones(address: str) -> None:
    for found in ([address], ["8.8.8.8", address], [address, "8.8.8.8"]):
        with pytest.raises(SourceError, match=r"leads to"):
            checked_address("models.test", 443, private=False, resolve=lambda host, port, found=found: found)


@pytest.mark.parametrize(
    "address", ["169.254.169.254", "0.0.0.0", "fd00:ec2::254", "::ffff:169.254.169.254", "ff02::1"]
)
def test_private_addresses_never_include_metadata_services(address: str) -> None:
    with pytest.raises(SourceError):
        checked_address("store.test", 80, private=True, resolve=lambda host, port: [address])


@pytest.mark.parametrize("host", ["2130706433", "0x7f000001", "0177.0.0.1", "127.1"])
def test_odd_spellings_of_addresses_are_judged_by_what_they_lead_to(host: str) -> None:
    with pytest.raises(SourceError, match="leads to 127"):
        checked_address(host, 80, private=False, resolve=system_resolver)


def test_the_connection_goes_to_the_address_that_was_checked(site: Site, tmp_path: Path) -> None:
    """A name server that answers differently the second time gains nothing."""
    answers = iter(["127.0.0.1", "127.0.0.1"] + ["10.255.255.1"] * 9)
    asked: list[str] = []

    def rebinding(host: str, port: int) -> list[str]:
        asked.append(host)
        return [next(answers)]

    site.files = {f"/{name}": content for name, content in LORA.items()}
    base = f"http://models.test:{site.port}"
    with pytest.raises(
        SourceUnavailableError
    ):  # expert.json and adapter_config.json came, the weights would not
        fetch(base, tmp_path, policy(base, private=True, seconds=5), resolve=rebinding)
    assert len(asked) == 3
    assert [path for _, path in site.asked] == ["/expert.json", "/adapter_config.json"]


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("http://169.254.169.254/latest/meta-data/", "not among"),
        ("http://127.0.0.1/", "not among"),
        ("http://[::1]/", "not among"),
        ("http://2130706433/", "not among"),
        ("http://evil.example/", "not among"),
        ("//evil.example/x", "not among"),
        ("file:///etc/passwd", "scheme"),
        ("s3://bucket/key", "redirects from http to s3"),
        ("http://inside.test/", "leads to"),
        ("/loop", "redirects"),
        ("http://a b/", "ASCII"),
    ],
)
def test_a_redirect_is_checked_like_the_first_url(site: Site, tmp_path: Path, target: str, why: str) -> None:
    def resolve(host: str, port: int) -> list[str]:
        return ["169.254.169.254"] if host == "inside.test" else ["127.0.0.1"]

    base = f"http://models.test:{site.port}/"
    site.redirects = {"/expert.json": target, "/loop": "/loop"}
    with pytest.raises(SourceError, match=why):
        fetch(base, tmp_path, policy(base, "http://inside.test/", private=True), resolve=resolve)


def test_a_redirect_to_an_allowed_place_is_followed_with_its_query(site: Site, tmp_path: Path) -> None:
    site.files = {"/adapter_config.json": b"{}", "/blobs/1": b"weights"}
    base, other = f"http://models.test:{site.port}", f"http://cdn.test:{site.port}/blobs/"
    site.redirects = {"/adapter_model.safetensors": f"{other}1?signature=abc"}
    fetch(base, tmp_path, policy(base, other, private=True), resolve=loopback)
    assert got(tmp_path) == {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"}
    assert (f"cdn.test:{site.port}", "/blobs/1?signature=abc") in site.asked


@pytest.mark.parametrize("announced", [True, False])
def test_too_many_bytes_end_the_fetch(site: Site, tmp_path: Path, announced: bool) -> None:
    site.announce = announced
    site.files = {"/adapter_config.json": b"{}", "/adapter_model.safetensors": b"x" * 5_000_000}
    base = f"http://models.test:{site.port}"
    with pytest.raises(SourceTooLargeError, match="1000000 bytes"):
        fetch(base, tmp_path, policy(base, private=True, max_bytes=1_000_000), resolve=loopback)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size <= 1_000_000 if not announced else True


def test_a_server_that_drips_is_left_in_time(site: Site, tmp_path: Path) -> None:
    site.files = {"/expert.json": b"x" * 400}
    site.drip = 0.02
    base = f"http://models.test:{site.port}"
    begun = time.monotonic()
    with pytest.raises(SourceUnavailableError, match=r"longer than 0\.3 s"):
        fetch(base, tmp_path, policy(base, private=True, seconds=0.3), resolve=loopback)
    assert time.monotonic() - begun < 4


def test_compressed_answers_are_refused(site: Site, tmp_path: Path) -> None:
    site.files = {"/expert.json": b"\x1f\x8b"}
    site.headers = {"/expert.json": {"Content-Encoding": "gzip"}}
    base = f"http://models.test:{site.port}"
    with pytest.raises(SourceUnavailableError, match="compressed"):
        fetch(base, tmp_path, policy(base, private=True), resolve=loopback)


def test_nothing_usable_there_says_what_was_looked_for(site: Site, tmp_path: Path) -> None:
    base = f"http://models.test:{site.port}"
    with pytest.raises(SourceUnavailableError, match=r"adapter_config\.json"):
        fetch(base, tmp_path, policy(base, private=True), resolve=loopback)
    site.files = {"/adapter_config.json": b"{}", "/adapter_model.bin": b"pickle"}
    with pytest.raises(SourceUnavailableError, match="pickled"):
        fetch(base, tmp_path, policy(base, private=True), resolve=loopback)


def test_a_certificate_must_be_the_names_own(tmp_path: Path) -> None:
    pem = certificate("models.test", tmp_path)
    trust = ssl.create_default_context(cafile=str(pem))
    target = tmp_path / "got"
    target.mkdir()
    with web_site(pem) as site:
        site.files = {f"/{name}": content for name, content in LORA.items()}
        good, bad = f"https://models.test:{site.port}", f"https://other.test:{site.port}"
        fetch(good, target, policy(good, private=True), resolve=loopback, trust=trust)
        assert got(target) == LORA
        with pytest.raises(SourceUnavailableError, match=r"other\.test"):
            fetch(bad, target, policy(bad, private=True), resolve=loopback, trust=trust)
        site.redirects = {"/expert.json": f"http://models.test:{site.port}/x"}
        with pytest.raises(SourceError, match="https to http"):
            fetch(good, target, policy(good, private=True), resolve=loopback, trust=trust)


def test_an_object_store_gives_the_same_files(object_store: ObjectStoreServer, tmp_path: Path) -> None:
    bucket = object_store.bucket()
    for name, content in {**LORA, "adapter_model.bin": b"pickle"}.items():
        object_store.damage(f"{bucket}/team/lora/{name}", content)
    object_store.damage(f"{bucket}/private/adapter_config.json", b"{}")
    allowed = policy(f"{bucket}/team", options=object_store.options)
    fetch(f"{bucket}/team/lora", tmp_path, allowed)
    assert got(tmp_path) == LORA
    for outside in (f"{bucket}/private", f"{object_store.bucket()}/team/lora", f"{bucket}/teams"):
        with pytest.raises(SourceError, match="not among"):
            fetch(outside, tmp_path, allowed)
    with pytest.raises(SourceUnavailableError, match="none of"):
        fetch(f"{bucket}/team/nothing", tmp_path, allowed)


@pytest.mark.parametrize(
    "prefix", ["models.test", "file:///srv", "https://u:p@h/", "https://h/?a=b", "https://"]
)
def test_an_allow_list_with_a_mistake_is_refused(prefix: str) -> None:
    with pytest.raises(SourceError, match="source_urls"):
        parse_prefixes((prefix,))


def test_a_url_is_told_as_it_was() -> None:
    for url in ("https://h.test/a/b", "http://h.test:8080/", "s3://bucket/key", "http://[2606:4700::1]/x"):
        assert str(parse(url)) == url
