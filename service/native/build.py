"""The compiled library: found in the cache, or compiled into it.

A library belongs to one source, one torch, one processor level; its name is the digest of all three, so a
stale one is never loaded. Compilation takes about 15 s, happens once, and is atomic: several servers may
start at the same time.
"""

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from importlib.resources import files
from pathlib import Path

import torch

_log = logging.getLogger(__name__)

_SOURCES = ("decoder.cpp", "mix.cpp", "elementwise.cpp", "attention.cpp", "quantised.cpp")
_SECONDS = 600

_WIDE = ("-march=x86-64-v4", "-mprefer-vector-width=512")
LEVELS: dict[str, tuple[str, ...]] = {
    "amx": (*_WIDE, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
    "avx512-bf16": (*_WIDE, "-mavx512bf16"),
    "avx512": _WIDE,
    "avx2": ("-march=x86-64-v3",),
    "default": (),
}
"""Processor level → the compiler's flags for it."""


class NativeUnavailableError(Exception):
    """There is no compiled library and none can be made; the message says why."""


def default_cache() -> Path:
    """Where libraries are kept unless the operator names another folder: the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "twinserve"


def levels() -> tuple[str, ...]:
    """Every level that machines of this kind may have."""
    return tuple(LEVELS) if platform.machine() in ("x86_64", "AMD64") else ("default",)


def this_level() -> str:
    """The best level that this processor has."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX512":
        # The system has to grant the use of tiles to the process first.
        if torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx():
            return "amx"
        return "avx512-bf16" if torch.cpu._is_avx512_bf16_supported() else "avx512"
    return "avx2" if capability == "AVX2" else "default"


def library(cache: Path, level: str | None = None) -> Path:
    """The library for a processor level, this machine's if None; compiled first if it is not in the cache. Blocks.

    Raises:
        NativeUnavailableError: no compiler, a failed compilation, or a cache that cannot be written.
    """
    flags = _flags(level or this_level())
    target = cache / f"native-{_digest(flags)}.so"
    if not target.exists():
        _compile(target, flags)
    return target


def load(cache: Path) -> None:
    """Register the library's class with torch, once a process.

    Raises:
        NativeUnavailableError: as `library`, or the library does not load.
    """
    path = library(cache)
    if str(path) in torch.classes.loaded_libraries:
        return
    try:
        torch.classes.load_library(str(path))
    except OSError as error:
        raise NativeUnavailableError(
            f"{path} does not load, delete it to have it compiled again: {error}"
        ) from error


def _flags(level: str) -> tuple[str, ...]:
    return ("-std=c++20", "-O3", *LEVELS[level], "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC")


def _digest(flags: tuple[str, ...]) -> str:
    source = files("service.native") / "src"
    digest = hashlib.sha256()
    for part in sorted(entry.name for entry in source.iterdir()):
        digest.update(part.encode() + b"\0" + (source / part).read_bytes() + b"\0")
    for word in (torch.__version__, platform.machine(), *flags):
        digest.update(word.encode() + b"\0")
    return digest.hexdigest()[:16]


def _compile(target: Path, flags: tuple[str, ...]) -> None:
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    if compiler is None:
        raise NativeUnavailableError("no C++ compiler (g++) on PATH; install one, or copy a built cache here")
    root = Path(torch.__file__).parent
    source = Path(str(files("service.native") / "src"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            made = Path(scratch) / target.name
            _log.info("compiling the native decoder into %s, once (about 15 s)", target)
            # Without -lgomp: the symbols are those of the OpenMP that torch has loaded. A second copy would
            # bring a second pool of threads.
            command = [
                compiler, *flags,
                *(f"-I{folder}" for folder in (root / "include", root / "include/torch/csrc/api/include")),
                *(str(source / name) for name in _SOURCES),
                "-c",
            ]  # fmt: skip
            _run(command, scratch)
            objects = [Path(name).with_suffix(".o").name for name in _SOURCES]
            link = [
                compiler,
                "-shared",
                "-o",
                str(made),
                *objects,
                f"-L{root / 'lib'}",
                "-ltorch_cpu",
                "-lc10",
            ]
            _run(link, scratch)
            made.replace(target)
    except OSError as error:
        raise NativeUnavailableError(
            f"cannot write the native library to {target.parent}: {error}"
        ) from error


def _run(command: list[str], folder: str) -> None:
    try:
        done = subprocess.run(  # noqa: S603 the compiler, with our own arguments
            command, cwd=folder, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise NativeUnavailableError(f"the compiler took longer than {_SECONDS} s") from error
    if done.returncode:
        raise NativeUnavailableError(f"{command[0]} failed: {done.stderr.strip()[-2000:]}")
