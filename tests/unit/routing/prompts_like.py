"""Made-up features of experts' prompts: clusters on a scale that needs standardising."""

import torch
from torch import Tensor

NAMES = ("a", "b", "c")


def clusters(
    count: int, seed: int, *, names: tuple[str, ...] = NAMES, noise: float = 0.5, width: int = 8
) -> dict[str, Tensor]:
    """Expert → (count, width) around one centre an expert, whatever the other names are."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 100
        + 5
        * (
            3 * torch.eye(width)[ord(name) - ord("a")]
            + noise * torch.randn(count, width, generator=generator)
        )
        for name in names
    }


def far_off(count: int, seed: int, width: int = 8) -> Tensor:
    """(count, width) like no expert's prompts."""
    generator = torch.Generator().manual_seed(seed)
    return 100 + 60 * torch.randn(count, width, generator=generator)
