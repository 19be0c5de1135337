"""Features of prompts as a file: what the router learns of an expert, kept with its generation."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from experts.errors import CorruptBlobError

_FEATURES = "features"
_FORMS = "forms"


def write_profile(path: Path, features: Tensor, forms: int) -> None:
    """Write features (prompts × forms, d), float32."""
    tensors = {_FEATURES: features.to(torch.float32).contiguous()}
    save_file(tensors, path, metadata={_FORMS: str(forms)})


def read_profile(path: Path) -> tuple[Tensor, int]:
    """Features (prompts × forms, d) float32, and the forms of each prompt.

    Raises:
        CorruptBlobError: it is no such file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            forms = int((file.metadata() or {})[_FORMS])
            features: Tensor = file.get_tensor(_FEATURES)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CorruptBlobError(
            f"{path}: not a routing profile ({error}); register the expert again"
        ) from error
    if features.dim() != 2 or features.dtype != torch.float32 or forms < 1 or features.shape[0] % forms:
        raise CorruptBlobError(f"{path}: not a routing profile; register the expert again")
    return features, forms
