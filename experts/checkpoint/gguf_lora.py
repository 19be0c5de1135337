"""A LoRA adapter in llama.cpp's GGUF form as a fine-tune: exact products, names and row order turned back."""

from pathlib import Path

import torch
from torch import Tensor

from experts.checkpoint.fine_tune import require_shape
from experts.checkpoint.gguf_file import GgufFile, find_gguf, read_gguf
from experts.checkpoint.gguf_names import GgufNames
from experts.checkpoint.model import Checkpoint
from experts.checkpoint.names import TOKEN_EMBEDDINGS, module_name
from experts.errors import CheckpointError, MismatchError
from experts.factors import LowRank

_DOWN, _UP = ".lora_a", ".lora_b"


class GgufLora:
    """A folder with one GGUF adapter; see `FineTune`."""

    def __init__(self, name: str, path: Path, base: Checkpoint) -> None:
        """Open the adapter in the folder `path`.

        Raises:
            CheckpointError: not a readable GGUF file, not a plain LoRA, or quantised.
            MismatchError: it is of another architecture or a tensor does not fit; names it.
        """
        file = find_gguf(path)
        if file is None:
            raise CheckpointError(f"{path} has no .gguf file; give the folder of a GGUF adapter")
        self.name = name
        self.path = path
        self.files = (file,)
        self._base = base
        self._file = read_gguf(file)
        self._names = _names(self._file, base)
        self._alpha = _alpha(self._file)
        self._products = {self._parameter(stem): stem for stem in _stems(self._file)}
        for parameter, stem in self._products.items():
            self._require_fit(parameter, stem)

    def touched(self) -> frozenset[str]:
        """Names of the parameters that the adapter holds a change for."""
        return frozenset(self._products)

    def delta(self, name: str) -> LowRank | None:
        """θ_t − θ₀ of one parameter as a product, float32; None where untouched."""
        self._base.stored(name)
        stem = self._products.get(name)
        if stem is None:
            return None
        down = self._file.tensor(stem + _DOWN).to(torch.float32)
        up = self._file.tensor(stem + _UP).to(torch.float32)
        scaling = self._alpha / up.shape[1] if self._alpha else 1.0
        if _is_embedding(
            name
        ):  # llama.cpp looks A up by token, so that A is (vocabulary, k) and B (hidden, k)
            return LowRank(down * scaling, up.T.contiguous())
        return LowRank(self._names.to_halves(name, up).contiguous() * scaling, down)

    def tensor(self, name: str) -> Tensor | None:
        """None: an adapter of this form replaces nothing whole."""
        self._base.stored(name)
        return None

    def _parameter(self, stem: str) -> str:
        parameter = self._names.by_name.get(stem)
        if parameter is None:
            raise MismatchError(
                f"{self._file.path}: {stem} is no matrix of {self._base.path}; is it an adapter of this base?"
            )
        if _is_embedding(parameter) and self._base.ties_head:
            raise MismatchError(
                f"{self._file.path} changes {parameter} without the output head that the base ties to it, which no "
                "weights of this architecture can express; leave the embedding out"
            )
        return parameter

    def _require_fit(self, parameter: str, stem: str) -> None:
        down, up = self._file.tensors[stem + _DOWN].shape, self._file.tensors[stem + _UP].shape
        if len(down) != 2 or len(up) != 2 or up[1] != (down[1] if _is_embedding(parameter) else down[0]):
            raise MismatchError(
                f"{self._file.path}: LoRA factors of {stem} have shapes {list(down)} (A) and {list(up)} (B), which "
                "do not multiply; convert the adapter again"
            )
        made = (down[0], up[0]) if _is_embedding(parameter) else (up[0], down[1])
        require_shape(self._file.path, parameter, made, self._base)


def _is_embedding(parameter: str) -> bool:
    return module_name(parameter) in TOKEN_EMBEDDINGS


def _names(file: GgufFile, base: Checkpoint) -> GgufNames:
    """The base's names, once the file says that it is a plain LoRA for them."""
    told = {key: file.fields.get(key) for key in ("general.type", "adapter.type")}
    if told != {"general.type": "adapter", "adapter.type": "lora"}:
        raise CheckpointError(
            f"{file.path} is {told['general.type']!r}, {told['adapter.type']!r}, not an adapter that is a LoRA; "
            "give a full model as safetensors"
        )
    if file.fields.get("adapter.alora.invocation_tokens"):
        raise CheckpointError(
            f"{file.path} is an activated LoRA, which acts from some token on; give a plain LoRA"
        )
    if not GgufNames.supported(base.config):
        raise MismatchError(
            f"{file.path} cannot be read for a {base.config.get('model_type')}: its GGUF names and layout are not "
            "known; give the PEFT adapter instead"
        )
    names = GgufNames(base)
    if file.fields.get("general.architecture") != names.architecture:
        raise MismatchError(
            f"{file.path} is for {file.fields.get('general.architecture')!r} models, the base {base.path} is "
            f"{names.architecture!r}"
        )
    return names


def _alpha(file: GgufFile) -> float:
    """As llama.cpp reads it: 0 or absent is a scaling of 1."""
    alpha = file.fields.get("adapter.lora.alpha", 0.0)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < float("inf"):
        raise CheckpointError(f"{file.path}: adapter.lora.alpha is {alpha!r}, expected a finite number")
    return float(alpha)


def _stems(file: GgufFile) -> list[str]:
    """What the adapter changes, by llama.cpp's names."""
    found: dict[str, set[str]] = {}
    for name in file.tensors:
        for ending in (_DOWN, _UP):
            if name.endswith(ending):
                found.setdefault(name.removesuffix(ending), set()).add(ending)
                break
        else:
            raise CheckpointError(
                f"{file.path}: {name} is not part of a LoRA product (llama.cpp leaves it out, too); give the PEFT "
                "adapter or the full fine-tune instead"
            )
    for stem, halves in found.items():
        if len(halves) != 2:
            raise CheckpointError(f"{file.path} holds only one LoRA factor of {stem}; convert it again")
    if not found:
        raise CheckpointError(f"{file.path} holds no LoRA tensors; it would change nothing")
    return list(found)
