"""The library is compiled once, by whoever comes first; whatever goes wrong has a reason and costs no server."""

import logging
import multiprocessing
import os
import stat
from pathlib import Path

import pytest
import torch

from service.engine.model import ModelOptions, SharedModel, UnsupportedModelError
from service.native import build
from service.native.build import NativeUnavailableError
from tests.fixtures.tiny import tiny_model

COMPILER = """#!/bin/sh
echo "$*" >> {log}
case "$*" in
  *-shared*) sleep 0.2; while [ "$1" != -o ]; do shift; done; echo "library of $$" > "$2" ;;
  *) for each in "$@"; do case "$each" in *.cpp) : > "$(basename "$each" .cpp).o" ;; esac; done ;;
esac
"""


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch):
    """A compiler that notes its calls and compiles nothing."""
    log = tmp_path / "log"
    path = _script(tmp_path / "compiler", COMPILER.format(log=log))
    monkeypatch.setenv("CXX", str(path))
    return lambda: log.read_text().splitlines() if log.exists() else []


def _script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_the_library_is_compiled_once_and_found_afterwards(compiler, tmp_path):
    cache = tmp_path / "deep" / "cache"
    path = build.library(cache)
    assert path.parent == cache
    assert len(compiler()) == 2
    assert "-O3" in compiler()[0]
    assert build.library(cache) == path
    assert len(compiler()) == 2
    assert [entry.name for entry in cache.iterdir()] == [path.name]


def test_every_level_torch_and_source_has_its_own_library(compiler, tmp_path, monkeypatch):
    paths = {build.library(tmp_path / "cache", level) for level in build.LEVELS}
    assert len(paths) == len(build.LEVELS)
    monkeypatch.setattr(torch, "__version__", "99.0")
    assert build.library(tmp_path / "cache", "default") not in paths
    assert build.this_level() in build.levels()
    assert set(build.levels()) <= set(build.LEVELS)


def test_the_default_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.default_cache() == tmp_path / "twinserve"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert build.default_cache() == Path.home() / ".cache" / "twinserve"


def test_processes_that_build_at_once_end_with_one_whole_library(compiler, tmp_path):
    cache = tmp_path / "cache"
    with multiprocessing.get_context("fork").Pool(3) as pool:
        paths = pool.map(build.library, [cache] * 3, chunksize=1)
    assert len(set(paths)) == 1
    assert paths[0].read_text().startswith("library of ")
    assert [entry.name for entry in cache.iterdir()] == [paths[0].name]


def test_no_compiler_is_a_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(NativeUnavailableError, match="no C\\+\\+ compiler"):
        build.library(tmp_path / "cache")


def test_a_failed_compilation_tells_what_the_compiler_said_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(_script(tmp_path / "c", "#!/bin/sh\necho 'bad weather' >&2\nexit 1\n")))
    with pytest.raises(NativeUnavailableError, match="bad weather"):
        build.library(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_compiler_that_hangs_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "_SECONDS", 0.2)
    monkeypatch.setenv("CXX", str(_script(tmp_path / "c", "#!/bin/sh\nexec sleep 5\n")))
    with pytest.raises(NativeUnavailableError, match="longer than"):
        build.library(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_cache_that_cannot_be_written_is_a_reason(compiler, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NativeUnavailableError, match="cannot write the native library"):
        build.library(tmp_path / "file" / "cache")


@pytest.mark.parametrize("content", [b"", b"\x7fELF and then nothing", b"not a library at all" * 100])
def test_a_corrupt_library_is_a_reason_and_named(compiler, tmp_path, content):
    path = build.library(tmp_path / "cache")
    path.write_bytes(content)
    with pytest.raises(NativeUnavailableError, match="delete it") as caught:
        build.load(tmp_path / "cache")
    assert str(path) in str(caught.value)
    # Nothing was registered under that name.
    with pytest.raises(NativeUnavailableError):
        build.load(tmp_path / "cache")


@pytest.mark.parametrize("trouble", ["no compiler", "corrupt"])
def test_a_model_runs_uncompiled_and_says_why_unless_it_was_insisted_on(
    trouble, tmp_path, monkeypatch, caplog
):
    cache = tmp_path / "cache"
    if trouble == "corrupt":
        monkeypatch.setenv("CXX", str(_script(tmp_path / "c", COMPILER.format(log=os.devnull))))
        build.library(cache)
    else:
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CXX", raising=False)
    path = tiny_model("llama", tmp_path / "m")

    def model(choice: str) -> SharedModel:
        options = ModelOptions(kv_bytes=2**16, max_tokens=64, native=choice, native_cache=cache)
        return SharedModel(path, options, dtype=torch.float32, device=torch.device("cpu"), spec=None)

    with caplog.at_level(logging.INFO, "service.engine.model"):
        assert model("auto").native is None
    assert "decoder layers run uncompiled" in caplog.text
    with pytest.raises(UnsupportedModelError, match="TWINSERVE_NATIVE=on, but"):
        model("on")
    assert model("off").native is None
