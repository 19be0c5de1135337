"""What a registration names is settled once, and stays there until its job has read it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from experts.registry.blobs import Blobs
from experts.registry.catalogue import Catalogue
from experts.registry.records import Actor, JobFailure
from experts.registry.verify import collect_garbage, verify
from service.errors import RecordNotFoundError, TwinserveError, WrongStateError
from service.registrar.sources import Sources
from service.settings import Settings
from tests.fixtures.postgres import catalogue_url, postgres

__all__ = ["catalogue_url", "postgres"]

FILES = {
    "adapter_config.json": b'{"peft_type": "LORA"}',
    "adapter_model.safetensors": save({"base_model.model.a.lora_A.weight": torch.ones(2, 3)}),
}


@pytest.fixture
def blobs(tmp_path: Path) -> Iterator[Blobs]:
    opened = Blobs.open(str(tmp_path / "blobs"), tmp_path / "cache")
    yield opened
    opened.close()


@pytest.fixture
def sources(tmp_path: Path, blobs: Blobs, catalogue: Catalogue) -> Sources:
    return Sources.of(Settings(), tmp_path / "state", blobs, catalogue)


def uploaded(sources: Sources) -> str:
    upload = sources.uploads.create()
    for name, content in FILES.items():
        with sources.uploads.writing(upload.id, name, 0) as writer:
            writer.write(content)
    return upload.id


def read(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_an_upload_is_settled_once_and_any_replica_can_read_it(
    sources: Sources, catalogue: Catalogue, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {"name": "x", "upload": uploaded(sources), "replace": True}
    settled = sources.admit(asked)
    assert settled == {**asked, "files": settled["files"]}
    assert sources.admit(asked) == settled
    elsewhere_blobs = Blobs.open(str(tmp_path / "blobs"), tmp_path / "other-cache")
    elsewhere = Sources.of(Settings(), tmp_path / "other-state", elsewhere_blobs, catalogue)
    assert read(elsewhere.resolve(settled, tmp_path)) == FILES
    elsewhere_blobs.close()


def test_a_queued_jobs_upload_is_no_garbage_and_a_failed_ones_is(
    sources: Sources, blobs: Blobs, catalogue: Catalogue, tmp_path: Path
) -> None:
    asked = sources.admit({"name": "x", "upload": uploaded(sources)})
    job = catalogue.submit("register", asked, Actor(), name="x", limit=9)
    sources.remove(asked["upload"])  # its pins go with it
    collect_garbage(catalogue, blobs, 1, Actor())
    assert read(sources.resolve(job.request, tmp_path)) == FILES
    told = [finding for finding in verify(catalogue, blobs, watch_seconds=0).found if "pin" in finding.kind]
    assert told == []
    claimed = catalogue.claim("replica")
    assert claimed is not None
    collect_garbage(catalogue, blobs, 1, Actor())
    assert {entry["sha256"] for entry in asked["files"].values()} <= catalogue.referenced().keys()
    catalogue.fail(job.id, claimed.attempt, JobFailure("expert_rejected", "no"))
    collect_garbage(catalogue, blobs, 1, Actor())
    assert not any(blobs.has(entry["sha256"]) for entry in asked["files"].values())
    with contextlib.closing(Blobs.open(str(tmp_path / "blobs"), tmp_path / "other-cache")) as elsewhere:
        without = Sources.of(Settings(), tmp_path / "other-state", elsewhere, catalogue)
        with pytest.raises(RecordNotFoundError, match="upload them again"):
            without.resolve(job.request, tmp_path)


def test_an_upload_whose_files_were_collected_must_be_sent_again(
    sources: Sources, blobs: Blobs, catalogue: Catalogue
) -> None:
    asked = {"name": "x", "upload": uploaded(sources)}
    sources.admit(asked)
    collect_garbage(catalogue, blobs, 1, Actor())
    sources.admit(asked)  # pinned as long as the upload is there
    catalogue.unpin_blobs(asked["upload"])
    collect_garbage(catalogue, blobs, 1, Actor())
    with pytest.raises(WrongStateError, match="begin another"):
        sources.admit(asked)


@pytest.mark.parametrize(
    ("request_", "code", "param"),
    [
        ({"path": "x"}, "path_not_allowed", "path"),
        ({"url": "https://models.test/"}, "source_not_allowed", "url"),
        ({"upload": "upload-" + "0" * 24}, "record_not_found", "upload"),
    ],
)
def test_what_is_refused_names_its_field(
    sources: Sources, request_: dict[str, str], code: str, param: str
) -> None:
    with pytest.raises(TwinserveError) as caught:
        sources.admit(request_)
    assert (caught.value.code, caught.value.param) == (code, param)


@pytest.mark.parametrize(
    "options",
    [
        {"source_urls": ("models.test",)},
        {"source_urls": ("file:///srv/",)},
        {"signature_keys": Path("/nothing")},
        {"blob_options": "{", "source_urls": ("s3://models/",)},
    ],
)
def test_settings_that_cannot_hold_are_told_at_the_start(
    blobs: Blobs, catalogue: Catalogue, tmp_path: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r"source_urls|trusted keys|blob_options"):
        Sources.of(Settings(**options), tmp_path, blobs, catalogue)
