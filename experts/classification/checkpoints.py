"""Folders of encoders and of their sequence classifiers: an encoder to merge, and a head with its labels."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experts.checkpoint import Checkpoint
from experts.checkpoint.compatibility import require_same_tokenizer
from experts.checkpoint.model import refuse_remote_code
from experts.checkpoint.storage import TensorStore, find_weights, read_json
from experts.classification.families import Family, check_head, family_of
from experts.errors import CheckpointError, MismatchError


class ClassifierFineTune:
    """A `*ForSequenceClassification` folder as a fine-tune of its encoder, with its head beside it.

    A full fine-tune in the sense of `experts.checkpoint.FineTune`, whose parameters are named as the bare
    encoder names them.

    Attributes:
        labels: in the order of the head's rows.
        head: its parameters, float32.
    """

    def __init__(self, name: str, path: Path, base: Checkpoint) -> None:
        """Open a folder against its encoder.

        Raises:
            CheckpointError: it cannot be read, or has no head or labels.
            MismatchError: its encoder has other parameters, another function or another tokenizer.
        """
        self.name = name
        self.path = path
        config = read_classifier_config(path)
        family = family_of(config, path)
        if family_of(base.config, base.path) is not family:
            raise MismatchError(
                f"{path} is a {config.get('model_type')}, the base {base.path} a {base.config.get('model_type')}"
            )
        _require_same_function(path, config, base)
        require_same_tokenizer(path, base.path)
        self._base = base
        self._prefix = f"{family.prefix}."
        self._store = TensorStore(find_weights(path, "model"))
        self.files = self._store.files
        self._check_encoder()
        self.labels = read_labels(path, config)
        self.head = self._read_head(family)

    def touched(self) -> frozenset[str]:
        """Names of the parameters that differ from the base. Reads both models once."""
        return frozenset(name for name in self._base.names if self.delta(name) is not None)

    def delta(self, name: str) -> Tensor | None:
        """θ_t − θ₀ of one parameter, dense float32; None where they are equal."""
        delta = self.tensor(name).to(torch.float32) - self._base.tensor(name).to(torch.float32)
        return delta if bool(delta.any()) else None

    def tensor(self, name: str) -> Tensor:
        """θ_t of one parameter, as stored."""
        return self._store.tensor(self._prefix + name)

    def _check_encoder(self) -> None:
        stored = set(self._store.names)
        for name in self._base.names:
            full = self._prefix + name
            if full not in stored:
                raise MismatchError(f"{self.path} lacks {full}; save the whole classifier, not a part of it")
            shape = self._store.stored(full).shape
            if shape != self._base.shape(name):
                raise MismatchError(
                    f"{self.path}: {full} has shape {list(shape)}, the base {list(self._base.shape(name))}"
                )
        for full in sorted(stored):
            surplus = full.startswith(self._prefix) and full.removeprefix(self._prefix) not in self._base
            # Old files store a table of positions, which is computed and not trained.
            if surplus and not full.endswith(".position_ids"):
                raise MismatchError(f"{self.path} has a parameter {full} that the base lacks")

    def _read_head(self, family: Family) -> Mapping[str, Tensor]:
        names = [name for name in self._store.names if not name.startswith(self._prefix)]
        shapes = {name: self._store.stored(name).shape for name in names}
        hidden = int(self._base.config["hidden_size"])
        problem = check_head(family, shapes, hidden, len(self.labels))
        if problem:
            raise CheckpointError(f"{self.path}: {problem}; save a classifier of its model class")
        return {name: self._store.tensor(name).to(torch.float32).clone() for name in names}


def read_classifier_config(path: Path) -> dict[str, Any]:
    """config.json of a sequence classifier.

    Raises:
        CheckpointError: no such folder, a LoRA, another kind of model, or remote code.
    """
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is not a folder; give a sequence classifier saved with save_pretrained"
        )
    if (path / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{path} is an adapter; merge it into its model (merge_and_unload) and save that"
        )
    refuse_remote_code(path)
    config = read_json(path / "config.json")
    architectures = config.get("architectures")
    named = architectures[0] if isinstance(architectures, list) and architectures else None
    if not (isinstance(named, str) and named.endswith("ForSequenceClassification")):
        raise CheckpointError(f"{path} is a {named}, not a sequence classifier")
    if config.get("problem_type") not in (None, "single_label_classification"):
        raise CheckpointError(
            f"{path}: problem_type {config['problem_type']!r} is not supported; one label must hold a text"
        )
    return config


def read_labels(path: Path, config: Mapping[str, Any]) -> tuple[str, ...]:
    """The label set of a classifier, in the order of its head's rows.

    Raises:
        CheckpointError: there are fewer than two labels, one is empty or twice, or the numbers have gaps.
    """
    table = config.get("id2label")
    if not isinstance(table, dict):
        raise CheckpointError(f"{path / 'config.json'} has no id2label; save the classifier with its labels")
    try:
        by_number = {int(number): str(label) for number, label in table.items()}
    except ValueError as error:
        raise CheckpointError(f"{path / 'config.json'}: id2label: {error}") from error
    labels = tuple(by_number.get(number, "") for number in range(len(by_number)))
    if len(labels) < 2 or not all(labels) or len(set(labels)) != len(labels):
        raise CheckpointError(
            f"{path / 'config.json'}: id2label must name two or more different labels, numbered from 0"
        )
    return labels


def save_encoder(base: Path, target: Path) -> Checkpoint:
    """Write the encoder that sequence classifiers of `base` share, as an ordinary Hugging Face folder.

    Raises:
        CheckpointError: `base` is no supported encoder, or transformers cannot load it.
    """
    from transformers import AutoModel, AutoTokenizer

    if not base.is_dir():
        raise CheckpointError(
            f"{base} is not a folder; give the encoder that the classifiers were trained from"
        )
    refuse_remote_code(base)
    family = family_of(read_json(base / "config.json"), base)
    try:
        model = AutoModel.from_pretrained(
            base,
            dtype="auto",
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            add_pooling_layer=family.has_pooler,
        )
        tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{base}: transformers cannot load the encoder: {error}") from error
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return Checkpoint.open(target)


_FUNCTION = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "layer_norm_eps", "intermediate_size",
    "position_embedding_type", "is_decoder",
)  # fmt: skip
"""Config fields that change what the same weights compute."""


def _require_same_function(path: Path, config: Mapping[str, Any], base: Checkpoint) -> None:
    for key in _FUNCTION:
        if key in config and key in base.config and config[key] != base.config[key]:
            raise MismatchError(
                f"{path}: {key} is {config[key]!r}, the base {base.path} has {base.config[key]!r}; "
                "merging needs classifiers of one encoder"
            )
