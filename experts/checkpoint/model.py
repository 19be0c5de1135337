"""A full model folder in Hugging Face's layout, opened lazily."""

import hashlib
import json
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experts.checkpoint.names import HEADS, RENAMED, TOKEN_EMBEDDINGS, module_name
from experts.checkpoint.storage import StoredTensor, TensorStore, find_weights, read_json
from experts.errors import CheckpointError

_BUFFER = re.compile(r"\.(?:attn|attention)\.(?:bias|masked_bias)$|rotary_emb\.inv_freq$")
"""Masks and frequencies that old GPT-2 and GPT-NeoX checkpoints store; they are computed, not trained."""

_VOLATILE = frozenset(
    {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "_attn_implementation"}
)
"""Config fields that change without the model's function changing."""

_CHUNK = 1 << 20


class Checkpoint:
    """A base or full fine-tune: its config and, by name, its parameters.

    Names are those of the model class's own `named_parameters`, which files differ from here and there: a
    checkpoint stored without the base model's prefix (GPT-2 from the hub) gets it, GPT-NeoX's output head
    its new name; a tied head appears once, under the embedding's name; computed buffers are left out.

    Attributes:
        path: the folder.
        config: config.json as it stands.
        architecture: the model class, e.g. "LlamaForCausalLM".
        names: parameter names, in file order.
        files: the safetensors files that hold them.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], store: TensorStore) -> None:
        """Use `open`; this takes parts that are checked already."""
        self.path = path
        self.config = config
        self.architecture = str(config["architectures"][0])
        self.files = store.files
        self._store = store
        tied = self.ties_head and len(store.names) > len(HEADS & set(store.names))
        kept = [name for name in store.names if not _BUFFER.search(name) and not (tied and name in HEADS)]
        prefix = _missing_prefix(self.architecture, kept)
        self._stored_names = {self._parameter_name(name, prefix): name for name in kept}
        self.names: tuple[str, ...] = tuple(self._stored_names)

    @classmethod
    def open(cls, path: Path) -> "Checkpoint":
        """Open the folder `path`; headers are read, tensors are not.

        Raises:
            CheckpointError: missing or corrupt files, pickled or quantised weights, remote code; names
                the file and the mend.
        """
        if not path.is_dir():
            raise CheckpointError(f"{path} is not a folder; give a folder saved with save_pretrained")
        config = read_json(path / "config.json")
        refuse_remote_code(path)
        architectures = config.get("architectures")
        if not (isinstance(architectures, list) and architectures and isinstance(architectures[0], str)):
            raise CheckpointError(
                f"{path / 'config.json'} names no architecture; fill in its architectures list"
            )
        if config.get("quantization_config"):
            raise CheckpointError(
                f"{path / 'config.json'} describes quantised weights, which cannot be differenced; "
                "dequantise the model first"
            )
        checkpoint = cls(path, config, TensorStore(find_weights(path, "model")))
        for name in checkpoint.names:
            if not checkpoint.dtype(name).is_floating_point:
                raise CheckpointError(
                    f"{checkpoint.stored(name).file}: {name} has dtype {checkpoint.dtype(name)}; "
                    "parameters must be floating point, dequantise the model first"
                )
        return checkpoint

    def streamed(self) -> "Checkpoint":
        """The same, for who goes through its tensors one by one: each is read anew, none stays in memory."""
        return Checkpoint(self.path, self.config, TensorStore(self.files, mapped=False))

    def _parameter_name(self, stored: str, prefix: str) -> str:
        if stored in HEADS:
            return RENAMED.get((str(self.config.get("model_type")), stored), stored)
        return prefix + stored

    @cached_property
    def ties_head(self) -> bool:
        """Whether the output head shares the embedding's weights.

        Where config.json does not say, the model class's default does.
        """
        tied = self.config.get("tie_word_embeddings")
        if isinstance(tied, bool):
            return tied
        if HEADS.isdisjoint(self._store.names):
            return True
        # Imported here: transformers takes seconds, and current configs always say.
        from transformers import CONFIG_MAPPING

        model_type = str(self.config.get("model_type"))
        if model_type not in CONFIG_MAPPING:
            return False
        return bool(getattr(CONFIG_MAPPING[model_type](), "tie_word_embeddings", False))

    @cached_property
    def embedding(self) -> str | None:
        """Name of the token embedding; None if it has no usual name."""
        return next((name for name in self.names if module_name(name) in TOKEN_EMBEDDINGS), None)

    @property
    def vocab_rows(self) -> int | None:
        """Rows of the token embedding, padding included."""
        return self.shape(self.embedding)[0] if self.embedding is not None else None

    @cached_property
    def nbytes(self) -> int:
        """Stored bytes of all parameters."""
        return sum(self.stored(name).nbytes for name in self.names)

    def __contains__(self, name: object) -> bool:
        return name in self._stored_names

    def stored(self, name: str) -> StoredTensor:
        """Where a parameter lies on disk.

        Raises:
            CheckpointError: no such parameter.
        """
        if name not in self._stored_names:
            raise CheckpointError(f"{self.path} has no parameter {name}")
        return self._store.stored(self._stored_names[name])

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter, from the header alone."""
        return self.stored(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of a parameter, from the header alone."""
        return self.stored(name).dtype

    def tensor(self, name: str) -> Tensor:
        """A parameter as stored: a view of the mapped file, to be read only."""
        return self._store.tensor(self.stored(name).name)

    def fingerprint(self) -> str:
        """sha256 over the config's essentials and every parameter's name, dtype, shape and bytes.

        Independent of sharding, of file order and of config fields that do not change the function.
        Reads all weights once, a megabyte at a time.
        """
        essentials = {key: value for key, value in self.config.items() if key not in _VOLATILE}
        digest = hashlib.sha256(json.dumps(essentials, sort_keys=True).encode())
        buffer = memoryview(bytearray(_CHUNK))
        for name in sorted(self.names):
            tensor = self.stored(name)
            digest.update(f"\0{name}\0{tensor.dtype}\0{tensor.shape}\0".encode())
            with tensor.file.open("rb") as file:
                file.seek(tensor.start)
                left = tensor.nbytes
                while left:
                    count = file.readinto(buffer[: min(left, _CHUNK)])
                    if not count:
                        raise CheckpointError(f"{tensor.file} ended within {name}; was it overwritten?")
                    digest.update(buffer[:count])
                    left -= count
        return digest.hexdigest()


def refuse_remote_code(folder: Path) -> None:
    """Raise if a config in `folder` asks for Python code of its own.

    Raises:
        CheckpointError: an `auto_map` is present; names the file.
    """
    for name in ("config.json", "tokenizer_config.json", "generation_config.json", "adapter_config.json"):
        path = folder / name
        if path.is_file() and read_json(path).get("auto_map"):
            raise CheckpointError(
                f"{path} has an auto_map, which runs code that comes with the model, and is refused; "
                "use a model class that transformers ships and remove the field"
            )


def _missing_prefix(architecture: str, names: list[str]) -> str:
    """Such as "transformer." where a model with a head was stored without it; else empty."""
    if len({name.split(".")[0] for name in names if name not in HEADS}) <= 1:
        return ""
    # Imported here: transformers takes seconds, and models saved by it never come this way.
    import transformers

    model_class = getattr(transformers, architecture, None)
    prefix = getattr(model_class, "base_model_prefix", "")
    is_headless = model_class is None or not getattr(model_class, "can_generate", bool)()
    if not prefix or is_headless or any(name.startswith(f"{prefix}.") for name in names):
        return ""
    return f"{prefix}."
