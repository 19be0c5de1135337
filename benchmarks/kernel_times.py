"""The compiled decoder built once more, with a clock around every kernel, where the product looks for its own."""

import ctypes
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

import torch

from service.native import build

KINDS = ("base products", "mixing", "norms", "residuals", "activation", "rotation", "KV store", "attention")

_HEADER = Path(__file__).with_name("kernel_times.h")
_PRODUCT = "return op.call("
_TIMED_PRODUCT = "const timed::Span span(timed::kProducts); return op.call("


class KernelTimesUnavailableError(RuntimeError):
    """The instrumented library cannot be had, and why."""


class KernelTimes:
    """Seconds by kind of kernel since the last look.

    Args:
        library: the instrumented one, already loaded by the product.
    """

    def __init__(self, library: Path) -> None:
        self._read = ctypes.CDLL(str(library)).twinserve_kernel_times
        self._values = (ctypes.c_double * len(KINDS))()

    def take(self) -> Mapping[str, float]:
        """What has added up; begins again."""
        self._read(self._values)
        return dict(zip(KINDS, self._values, strict=True))


def instrumented(folder: Path) -> Path:
    """The library in `folder`, built if it is not there; a server whose native cache that is will load it.

    Raises:
        KernelTimesUnavailableError: it cannot be built.
    """
    folder.mkdir(parents=True, exist_ok=True)
    flags = build._flags(build.this_level())
    # Its name says which sources it was made of, as the product's own does.
    target = folder.resolve() / f"native-{build._digest(flags)}.so"
    if not target.exists():
        _build(target, target.parent / "source", flags)
    return target


def _build(target: Path, scratch: Path, flags: Sequence[str]) -> None:
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(Path(str(files("service.native") / "src")), scratch)
    decoder = scratch / "decoder.cpp"
    text = decoder.read_text(encoding="utf-8")
    if text.count(_PRODUCT) != 1:
        raise KernelTimesUnavailableError(f"{decoder.name} has no single {_PRODUCT!r} to time")
    decoder.write_text(text.replace(_PRODUCT, _TIMED_PRODUCT), encoding="utf-8")
    root = Path(torch.__file__).parent
    includes = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}", f"-I{scratch}"]
    objects = []
    for source in build._SOURCES:
        clock = ["-include", str(_HEADER)] if source == decoder.name else []
        objects.append(str(scratch / source) + ".o")
        _run("g++", *flags, *includes, *clock, "-c", str(scratch / source), "-o", objects[-1])
    libraries = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
    _run("g++", "-shared", "-o", str(target), *objects, *libraries)


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise KernelTimesUnavailableError(str(error)) from error
    if done.returncode:
        raise KernelTimesUnavailableError(done.stderr.strip()[-1500:])
