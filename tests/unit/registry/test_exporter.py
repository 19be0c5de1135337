"""Exports on a server's disk: one at a time, never more than fits, and nothing of them stays."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from experts.registry.records import Generation
from service.errors import QueueFullError, RegistryUnavailableError, StorageFullError, WrongStateError
from service.registrar import Registry, open_registry
from service.registrar.exports import Exporter
from service.settings import Settings
from tests.fixtures.tiny import tiny_bundle


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    bundle = tiny_bundle(tmp_path_factory.mktemp("exporter"), experts=("alpha",), router=False)
    opened = open_registry(Settings(bundle=bundle))
    yield opened
    opened.close()


@pytest.fixture
def alpha(registry: Registry) -> Generation:
    return registry.family.snapshot.experts["alpha"]


def _files(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file()]


def test_one_export_is_made_at_a_time_and_removed_when_it_has_been_sent(
    registry: Registry, alpha: Generation, tmp_path: Path
) -> None:
    exporter = Exporter(lambda: registry.family, tmp_path, turn_seconds=0.05)

    async def both() -> None:
        async with exporter.expert("peft", alpha) as one:
            assert set(one.files) == {path.name for path in one.folder.iterdir()}
            with pytest.raises(QueueFullError, match="one is made at a time") as refused:
                await exporter.expert("gguf", alpha).__aenter__()
            assert refused.value.retry_after == 0.05
        assert not _files(tmp_path)
        async with exporter.expert("gguf", alpha) as two:
            assert two.files == ("alpha.gguf",)

    asyncio.run(both())
    assert not _files(tmp_path)


def test_an_export_that_nobody_waits_for_any_more_stops(
    registry: Registry, alpha: Generation, tmp_path: Path
) -> None:
    exporter = Exporter(lambda: registry.family, tmp_path)

    async def given_up() -> None:
        making = asyncio.ensure_future(exporter.model([(alpha, 1.0)]).__aenter__())
        await asyncio.sleep(0)
        making.cancel()
        with pytest.raises(asyncio.CancelledError):
            await making
        assert not _files(tmp_path)
        async with exporter.model([(alpha, 1.0)]) as made:
            assert "model.safetensors" in made.files

    asyncio.run(given_up())


def test_what_does_not_fit_on_the_disk_is_not_begun(
    registry: Registry, alpha: Generation, tmp_path: Path
) -> None:
    exporter = Exporter(lambda: registry.family, tmp_path, free=lambda _: 1000)

    async def refused() -> None:
        for making in (exporter.model([]), exporter.expert("peft", alpha)):
            with pytest.raises(StorageFullError, match="of which 1000 are free"):
                await making.__aenter__()

    asyncio.run(refused())
    assert not _files(tmp_path)


def test_only_ready_generations_of_this_bundle_are_exported(
    registry: Registry, alpha: Generation, tmp_path: Path
) -> None:
    exporter = Exporter(lambda: registry.family, tmp_path)

    async def refused() -> None:
        for wrong in (replace(alpha, state="failed"), replace(alpha, build_id="other")):
            with pytest.raises(WrongStateError):
                await exporter.expert("peft", wrong).__aenter__()

    asyncio.run(refused())


def test_a_scratch_folder_that_cannot_be_made_is_told(
    registry: Registry, alpha: Generation, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    exporter = Exporter(lambda: registry.family, tmp_path / "file" / "scratch")

    async def refused() -> None:
        with pytest.raises(RegistryUnavailableError):
            await exporter.expert("peft", alpha).__aenter__()

    asyncio.run(refused())
