"""How llama.cpp calls and lays out the linear layers of Llama-like models.

Follows its converter: the `gguf` package's name map, and the rows of Q and K of the "llama" architecture reordered
from halves to pairs within each head, since it rotates neighbours where transformers rotates halves.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from torch import Tensor

from experts.checkpoint.model import Checkpoint

_ARCHITECTURES = {
    "llama": "LLAMA",
    "mistral": "LLAMA",
    "qwen2": "QWEN2",
    "qwen3": "QWEN3",
    "gemma2": "GEMMA2",
    "gemma3_text": "GEMMA3",
    "phi3": "PHI3",
}
"""transformers' model type → llama.cpp's, of those whose linear layers are converted as they are, but for Q and K."""

_REORDERED = frozenset({"LLAMA"})


class GgufNames:
    """The names of one model, both ways."""

    def __init__(self, model: Checkpoint) -> None:
        """For a model of a type in `supported`.

        Raises:
            KeyError: of another type.
        """
        self._model = model
        self._kind = _ARCHITECTURES[str(model.config.get("model_type"))]

    @staticmethod
    def supported(config: Mapping[str, Any]) -> bool:
        """Whether models of that config have names here."""
        return str(config.get("model_type")) in _ARCHITECTURES

    @cached_property
    def architecture(self) -> str:
        """general.architecture."""
        import gguf

        return str(gguf.MODEL_ARCH_NAMES[getattr(gguf.MODEL_ARCH, self._kind)])

    @cached_property
    def by_parameter(self) -> Mapping[str, str]:
        """Parameter → llama.cpp's name of it, of every matrix that has one."""
        import gguf

        layers = int(self._model.config.get("num_hidden_layers", 0))
        names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, self._kind), layers)
        found = {
            parameter: names.get_name(parameter, try_suffixes=(".weight",))
            for parameter in self._model.names
            if len(self._model.shape(parameter)) == 2
        }
        return {parameter: str(name) for parameter, name in found.items() if name is not None}

    @cached_property
    def by_name(self) -> Mapping[str, str]:
        """llama.cpp's name → parameter."""
        return {name: parameter for parameter, name in self.by_parameter.items()}

    def to_pairs(self, parameter: str, up: Tensor) -> Tensor:
        """Rows of B, or of a whole weight, as llama.cpp orders them. (rows, k) → (rows, k)."""
        heads = self._heads(parameter)
        if heads is None:
            return up
        return up.reshape(heads, 2, -1, up.shape[1]).transpose(1, 2).reshape(up.shape)

    def to_halves(self, parameter: str, up: Tensor) -> Tensor:
        """The inverse of `to_pairs`."""
        heads = self._heads(parameter)
        if heads is None:
            return up
        return up.reshape(heads, -1, 2, up.shape[1]).transpose(1, 2).reshape(up.shape)

    def _heads(self, parameter: str) -> int | None:
        """Heads whose rows are reordered; None where none are."""
        if self._kind not in _REORDERED:
            return None
        queries = self._model.config.get("num_attention_heads")
        if parameter.endswith(".q_proj.weight"):
            return int(queries or 1)
        if parameter.endswith(".k_proj.weight"):
            return int(self._model.config.get("num_key_value_heads") or queries or 1)
        return None
