"""Load a Hugging Face folder for reading features: local files, safetensors, no code from the folder."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from experts.errors import RoutingError


def load_model(folder: Path, dtype: torch.dtype | None = None) -> nn.Module:
    """The causal language model of a folder in its stored dtype (or the one given), in evaluation mode.

    Raises:
        RoutingError: transformers cannot load it.
    """
    # Imported here, as below: it takes a second or two, and a registration loads no model.
    from transformers import AutoModelForCausalLM

    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype or "auto",
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise RoutingError(f"{folder}: transformers cannot load the model: {error}") from error
    return model.eval()


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder.

    Raises:
        RoutingError: transformers cannot load it.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise RoutingError(f"{folder}: transformers cannot load the tokenizer: {error}") from error
