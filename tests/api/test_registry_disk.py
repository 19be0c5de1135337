"""A disk that is full: who asks is told what to do, what serves goes on, and with room everything goes on."""

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.harness import ADMIN_KEY, Served, error_of, eventually
from tests.api.operators import Operator
from tests.fixtures.mounts import inside, mounted
from tests.fixtures.tiny import TinyFamily, tiny_lora

SIZE = 8 * 2**20
LARGE = {"rank": 64}
"""Such an expert has more than half a MiB, and is there twice while it is registered."""


@pytest.fixture
def root(family: TinyFamily, tmp_path: Path) -> Path:
    """LoRAs of a high rank."""
    for seed, name in enumerate(("one", "two", "three", "four"), 51):
        tiny_lora(tmp_path / "root" / name, family.base, rank=64, seed=seed)
    return tmp_path / "root"


class Disk:
    """A small disk with a registry on it, and a server that sees it as any other disk."""

    def __init__(self, folder: Path, seen: Path, bundle: Path, root: Path) -> None:
        self._filler = folder / "filler"
        self._state = folder / "state"
        self._inside = inside(folder)
        self._options = {
            "BUNDLE": bundle,
            "STATE_DIR": seen / "state",
            "EXPERTS_ROOT": root,
            "ADMIN_KEY": ADMIN_KEY,
            "DTYPE": "float32",
            "MIX_MODE": "factored",
            "THREADS": 1,
            "PORT": 0,
        }

    def leave(self, nbytes: int) -> None:
        """Fill it but for so many bytes."""
        with self._filler.open("wb", buffering=0) as file:
            about = os.statvfs(self._filler)
            os.posix_fallocate(file.fileno(), 0, about.f_bavail * about.f_frsize - nbytes)

    def empty(self) -> None:
        """Remove what fills it."""
        self._filler.unlink()

    def age(self) -> None:
        """Let it be a day ago that files were used: garbage collection spares what somebody may be about to open."""
        before = time.time() - 86_400
        for folder in (self._state / "cache" / "folders").iterdir():
            os.utime(folder, (before, before))

    def run(self, *arguments: str) -> "subprocess.Popen[str]":
        """A command of ours that works on it."""
        return subprocess.Popen(
            self._command(arguments), stdout=subprocess.PIPE, text=True, env=self._environment()
        )

    @contextlib.contextmanager
    def serving(self) -> Iterator[Operator]:
        """A server, until the block ends."""
        with self.run("serve") as server:
            assert server.stdout is not None
            try:
                told = (re.search(r"http://[0-9.]+:[0-9]+", line) for line in server.stdout)
                url = next(found.group() for found in told if found)
                with httpx.Client(base_url=url, timeout=60) as http:
                    yield Operator(Served(url, None, http))  # type: ignore[arg-type]
            finally:
                server.terminate()
                assert server.wait(30) == 0

    def _command(self, arguments: Sequence[str]) -> list[str]:
        return [*self._inside, sys.executable, "-m", "service", *arguments]

    def _environment(self) -> dict[str, str]:
        return {**os.environ, **{f"TWINSERVE_{name}": str(value) for name, value in self._options.items()}}


@pytest.fixture
def disk(family: TinyFamily, root: Path, tmp_path: Path) -> Iterator[Disk]:
    with mounted(tmp_path / "small", str(SIZE)) as folder:
        yield Disk(folder, tmp_path / "small", family.bundle, root)


def refused(answer: httpx.Response) -> None:
    assert (answer.status_code, error_of(answer)["code"]) == (507, "storage_full"), answer.text
    assert re.search(r"[Mm]ake some", error_of(answer)["message"]), answer.text


def sent(admin: Operator, upload: str, name: str, content: bytes) -> httpx.Response:
    return admin.ask("PUT", f"/uploads/{upload}/files/{name}", content=content)


def answers(admin: Operator) -> list[Any]:
    return [admin.text(model=name) for name in ("alpha", "colours")]


def test_what_does_not_fit_is_refused_with_the_mend_and_fits_once_there_is_room(disk: Disk) -> None:
    with disk.serving() as admin:
        for path, options in (("one", LARGE), ("two", LARGE), ("three", {})):
            admin.registered(name="colours", path=path, replace=True, **options)
        before = answers(admin)
        upload = admin.post("/uploads", {}).json()["id"]

        disk.leave(0)
        refused(admin.post("/uploads", {}))
        refused(sent(admin, upload, "adapter_config.json", b"{}"))
        refused(admin.register(name="new", path="four"))
        refused(admin.post("/experts/colours/rollback", {}))
        assert answers(admin) == before

        disk.leave(450_000)
        # What fits of a file stays until its upload is removed.
        refused(sent(admin, upload, "adapter_model.safetensors", bytes(600_000)))
        assert admin.ask("DELETE", f"/uploads/{upload}").status_code == 200
        refused(admin.register(name="new", path="four", **LARGE))
        assert admin.ask("GET", "/experts/new").status_code == 404
        assert answers(admin) == before
        with disk.run("registry", "verify") as check:
            told, _ = check.communicate(timeout=60)
        assert "everything agrees" in told
        assert check.returncode == 0

        disk.age()
        gone: set[str] = set()

        def collected() -> bool:
            gone.update(admin.post("/registry/gc", {"keep": 1}).json()["generations"])
            return gone == {"colours@1", "colours@2"}

        assert eventually(collected)
        assert admin.registered(name="new", path="four", **LARGE)["generation"] == 2
        assert admin.text(model="new")[1] == {"new": 2}
        disk.empty()
        assert admin.registered(name="new", path="one", replace=True, **LARGE)["generation"] == 3
        assert answers(admin) == before
