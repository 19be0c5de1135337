"""DARE (arXiv 2311.03099): drop entries of a task vector at random and rescale the rest."""

import hashlib

import torch
from torch import Tensor


def dare(delta: Tensor, drop_rate: float, generator: torch.Generator) -> Tensor:
    """Zero each entry with probability p, divide the others by 1 − p; the expectation stays δ.

    Args:
        delta: one tensor of one task vector, float32.
        drop_rate: p in [0, 1).
        generator: source of the draws, on the CPU.

    Returns:
        The sparsified task vector, the same shape.
    """
    if drop_rate == 0:
        return delta
    kept = torch.rand(delta.shape, generator=generator) >= drop_rate
    return torch.where(kept, delta / (1 - drop_rate), 0.0)


def dare_generator(seed: int, fine_tune: str, parameter: str) -> torch.Generator:
    """A generator of its own for each (seed, fine-tune's name, parameter).

    So the draws depend neither on the order of fine-tunes or parameters nor on what else is merged.
    """
    digest = hashlib.sha256(f"{seed}\0{fine_tune}\0{parameter}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
