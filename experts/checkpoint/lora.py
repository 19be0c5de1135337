"""A PEFT LoRA folder as a fine-tune: exact products B·A·scaling, never factor by factor.

LoRA: arXiv 2106.09685; rank-stabilised scaling: arXiv 2312.03732. What PEFT can save beside plain LoRA is
either represented exactly (whole modules, biases, per-module rank and alpha) or refused by name.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from experts.checkpoint.fine_tune import require_shape
from experts.checkpoint.lora_config import read_lora_config
from experts.checkpoint.model import Checkpoint
from experts.checkpoint.names import HEADS
from experts.checkpoint.storage import TensorStore, find_weights
from experts.errors import CheckpointError, MismatchError
from experts.factors import Delta, LowRank

_PREFIX = "base_model.model."
_KEY = re.compile(
    r"(?P<module>.+?)\.(?:lora_(?P<factor>[AB])\.(?P<leaf>weight|bias)"
    r"|lora_embedding_(?P<embedding>[AB])"
    r"|(?P<wrapped>base_layer\.)?(?P<value>weight|bias))"
)

_CONV1D = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
"""Model types whose linear weights are stored (in, out), as transformers' Conv1D has them."""


@dataclass(slots=True)
class _Product:
    """Keys of the factors of one parameter, and the module that PEFT's patterns match.

    Attributes:
        down: key of A: (k, in), or (k, vocabulary) for an embedding.
        up: key of B: (out, k), or (hidden, k) for an embedding.
    """

    module: str
    embedding: bool
    down: str = ""
    up: str = ""


@dataclass(slots=True)
class _Contents:
    """An adapter file's keys by the base parameter that they change."""

    products: dict[str, _Product] = field(default_factory=dict)
    bias_deltas: dict[str, tuple[str, str]] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)

    @property
    def parameters(self) -> frozenset[str]:
        return frozenset(self.products) | frozenset(self.bias_deltas) | frozenset(self.values)


class LoraFineTune:
    """A LoRA adapter of the base.

    The base is asked for shapes and config; its weights are read only for the parameters that the adapter
    replaces whole (`modules_to_save`, trained biases), where δ is θ_t minus that base's tensor.
    """

    def __init__(self, name: str, path: Path, base: Checkpoint) -> None:
        """Open the adapter folder `path`.

        Raises:
            CheckpointError: files missing, corrupt or pickled; a kind of adapter that is not plain LoRA.
            MismatchError: a tensor that does not fit the base; names it.
        """
        self.name = name
        self.path = path
        self._base = base
        self._config = read_lora_config(path)
        self.files = find_weights(path, "adapter_model")
        self._store = TensorStore(self.files)
        contents = _Contents()
        for key in self._store.names:
            self._sort_key(key, contents)
        self._drop_copies(contents)
        self._contents = contents
        self._require_tied_changes()
        for parameter, product in contents.products.items():
            self._require_fit(parameter, product)
        for parameter, (module, key) in contents.bias_deltas.items():
            if f"{module}.weight" not in contents.products:
                raise CheckpointError(
                    f"{path}: {key} changes {parameter} but has no LoRA factors; save it again"
                )
        if not contents.parameters:
            raise CheckpointError(f"{path} holds no LoRA tensors; it would change nothing")

    def touched(self) -> frozenset[str]:
        """Names of the parameters that the adapter holds a change for."""
        return self._contents.parameters

    def delta(self, name: str) -> Delta | None:
        """θ_t − θ₀ of one parameter, float32: `LowRank` for a product, dense for a replaced tensor."""
        base = self._base.stored(name)
        replaced = self.tensor(name)
        if replaced is not None:
            difference = replaced.to(torch.float32) - self._base.tensor(name).to(torch.float32)
            return difference if difference.any() else None
        if name in self._contents.products:
            return self._product(self._contents.products[name], base.shape)
        if name in self._contents.bias_deltas:
            module, key = self._contents.bias_deltas[name]
            rank = self._rank(self._contents.products[f"{module}.weight"])
            return self._store.tensor(key).to(torch.float32) * self._config.scaling(module, rank)
        return None

    def tensor(self, name: str) -> Tensor | None:
        """θ_t of a parameter that the adapter replaces whole, as stored; None for the others."""
        key = self._contents.values.get(name)
        return None if key is None else self._store.tensor(key)

    def _product(self, product: _Product, shape: tuple[int, ...]) -> LowRank:
        down = self._store.tensor(product.down).to(torch.float32)
        up = self._store.tensor(product.up).to(torch.float32)
        up = up * self._config.scaling(product.module, down.shape[0])
        if self._is_transposed(product, shape):
            return LowRank(down.T.contiguous(), up.T.contiguous())
        return LowRank(up, down.clone())

    def _rank(self, product: _Product) -> int:
        return self._store.stored(product.down).shape[0]

    def _is_transposed(self, product: _Product, shape: tuple[int, ...]) -> bool:
        """Whether the parameter is stored as (B·A)ᵀ: embeddings and Conv1D."""
        if product.embedding:
            return True
        out, into = self._store.stored(product.up).shape[0], self._store.stored(product.down).shape[1]
        if out != into:
            return shape == (into, out)
        # A square weight does not show its orientation. PEFT's flag is that of the last module wrapped.
        if f"{product.module}.weight" in HEADS:
            return False
        return self._config.transposed or self._base.config.get("model_type") in _CONV1D

    def _sort_key(self, key: str, contents: _Contents) -> None:
        """File one key of the adapter under the base parameter that it changes."""
        match = _KEY.fullmatch(key.removeprefix(_PREFIX))
        if match is None or not key.startswith(_PREFIX):
            raise CheckpointError(
                f"{self.path}: {key} is not part of a plain LoRA (DoRA, trained tokens and the like are not "
                "supported); merge the adapter into the model and give the full fine-tune instead"
            )
        module = match["module"]
        leaf = match["value"] or match["leaf"] or "weight"
        parameter = f"{module}.{leaf}"
        is_tied_head = parameter in HEADS and parameter not in self._base
        if is_tied_head and self._config.ties_head:
            return  # PEFT saves the embedding's change a second time under the head
        if parameter not in self._base:
            mend = (
                "the base ties its output head to the embedding, so it cannot change alone"
                if is_tied_head
                else f"is it an adapter of {self._base.path}?"
            )
            raise MismatchError(f"{self.path}: {key} changes {parameter}, which the base lacks; {mend}")
        if match["value"]:
            require_shape(self.path, parameter, self._store.stored(key).shape, self._base)
            contents.values[parameter] = key
        elif match["leaf"] == "bias":
            require_shape(self.path, parameter, self._store.stored(key).shape, self._base)
            contents.bias_deltas[parameter] = (module, key)
        else:
            is_embedding = match["embedding"] is not None
            product = contents.products.setdefault(parameter, _Product(module, is_embedding))
            if (match["factor"] or match["embedding"]) == "A":
                product.down = key
            else:
                product.up = key

    def _require_fit(self, parameter: str, product: _Product) -> None:
        """Raise unless A and B are there, agree on the rank and multiply to the parameter's shape."""
        if not (product.up and product.down):
            raise CheckpointError(f"{self.path} holds only one LoRA factor of {parameter}; save it again")
        up, down = self._store.stored(product.up).shape, self._store.stored(product.down).shape
        shape = self._base.shape(parameter)
        if len(up) != 2 or len(down) != 2 or up[1] != down[0] or not down[0]:
            raise MismatchError(
                f"{self.path}: LoRA factors of {parameter} have shapes {list(down)} (A) and {list(up)} (B), "
                "which do not multiply; save the adapter again"
            )
        rank = self._config.rank(product.module)
        if rank != down[0]:
            raise MismatchError(
                f"{self.path}: LoRA factors of {parameter} have rank {down[0]}, adapter_config.json says "
                f"{rank:g}; they are not of one training"
            )
        fits = [(down[1], up[0])] if product.embedding else [(up[0], down[1]), (down[1], up[0])]
        if shape not in fits:
            if product.embedding:
                require_shape(self.path, parameter, fits[0], self._base)
            raise MismatchError(
                f"{self.path}: the LoRA product of {parameter} has shape {list(fits[0])}, the base has "
                f"{list(shape)}; it is not an adapter of {self._base.path}"
            )
        if parameter in self._contents.values:
            raise MismatchError(
                f"{self.path}: {parameter} is both replaced whole and changed by a LoRA product; "
                "train it one way or the other"
            )

    def _drop_copies(self, contents: _Contents) -> None:
        """Forget whole tensors that are PEFT's copies of frozen base weights.

        It saves them for embeddings and heads that have a LoRA, or whose neighbour has.
        """
        for parameter, key in list(contents.values.items()):
            is_wrapped_copy = parameter in contents.products and ".base_layer." in key
            is_embedding = parameter == self._base.embedding
            if is_wrapped_copy or (is_embedding and self._equals_base(parameter, key)):
                del contents.values[parameter]

    def _equals_base(self, parameter: str, key: str) -> bool:
        stored, base = self._store.tensor(key), self._base.tensor(parameter)
        return torch.equal(stored.to(torch.float32), base.to(torch.float32))

    def _require_tied_changes(self) -> None:
        """Raise if the adapter changes the embedding but not the output head that shares its weights."""
        embedding = self._base.embedding
        if self._base.ties_head and not self._config.ties_head and embedding in self.touched():
            raise MismatchError(
                f"{self.path} changes {embedding} without the output head that the base ties to it, which no "
                "weights of this architecture can express; train with ensure_weight_tying=True or leave the "
                "embedding out"
            )
