"""What role a parameter plays, told from its name and shape."""

from typing import Literal

from experts.checkpoint.names import HEADS, POSITION_EMBEDDINGS, TOKEN_EMBEDDINGS, module_name

TensorKind = Literal["linear", "embedding", "head", "vector", "other"]
"""vector: biases and norms. other: what is neither a vector nor a matrix, such as fused expert
weights; no expert can change it."""


def tensor_kind(name: str, shape: tuple[int, ...]) -> TensorKind:
    """The role of a parameter of a decoder-only model."""
    if len(shape) == 1:
        return "vector"
    if len(shape) != 2:
        return "other"
    if name in HEADS:
        return "head"
    if module_name(name) in TOKEN_EMBEDDINGS | POSITION_EMBEDDINGS:
        return "embedding"
    return "linear"
