"""Random draws for the methods that drop entries: cheap, and the same on every machine."""

import hashlib

import numpy as np
import torch
from torch import Tensor

_STEPS = 1 << 16


class Draws:
    """A stream of 16-bit draws of its own for each (seed, fine-tune's name, parameter).

    So the draws depend neither on the order of fine-tunes or parameters nor on what else is merged.
    NumPy promises that a bit generator's raw stream never changes.
    """

    def __init__(self, seed: int, fine_tune: str, parameter: str) -> None:
        digest = hashlib.sha256(f"{seed}\0{fine_tune}\0{parameter}".encode()).digest()
        self._generator = np.random.SFC64(int.from_bytes(digest[:16], "little"))

    def take(self, shape: tuple[int, ...]) -> Tensor:
        """The next draws, uniform over 0 … 65535, float32. A stream may be cut at multiples of four only."""
        count = 1
        for extent in shape:
            count *= extent
        raw = self._generator.random_raw(-(-count // 4)).view(np.int16)[:count]
        return torch.from_numpy(raw).to(torch.float32).add_(_STEPS // 2).view(shape)


def survivors(drop_rate: Tensor | float, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Which entries survive, and what a survivor is multiplied by to keep the expectation.

    Args:
        drop_rate: p of each entry, broadcast against `draws`; rounded to a multiple of 2⁻¹⁶ below 1.
        draws: from `Draws.take`.

    Returns:
        ones and zeros in the shape of `draws`; 1 / (1 − p) of the rounded p, in the shape of `drop_rate`.
    """
    steps = (torch.as_tensor(drop_rate, dtype=torch.float64) * _STEPS).round().clamp_(0, _STEPS - 1)
    kept = (draws - (steps - 1).to(torch.float32)).clamp_(0, 1)
    return kept, (_STEPS / (_STEPS - steps)).to(torch.float32)
