"""The tiny family that is served: full-rank experts, so that each one's answers are its fine-tune's own."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experts.compression import CompressionSpec
from tests.fixtures.tiny import tiny_family, tiny_lora

RANK = 64
"""The model's hidden size: nothing of an expert is lost."""

PROFILE = [f"%% {word} {number} %%" for number, word in enumerate(["red", "blue", "pink", "teal"] * 3)]


@dataclass(frozen=True)
class Family:
    """What is served and registered.

    Attributes:
        versions: name of a fine-tune → its LoRA folder, all below `root`.
    """

    root: Path
    bundle: Path
    base: Path
    versions: dict[str, Path]


def make_family(folder: Path, experts: Sequence[str], versions: int, seed: int = 0) -> Family:
    """A bundle of the named experts, and further fine-tunes; `v0`, `v1`, … of them are registered later."""
    made = tiny_family(
        folder,
        experts=tuple(experts),
        compression=CompressionSpec(rank=RANK, dtype="float32"),
        seed=seed,
        name="family",
    )
    found = dict(made.fine_tunes)
    for number in range(versions):
        name = f"v{number}"
        found[name] = tiny_lora(folder / "fine-tunes" / name, made.base, 4, 10_000 + 100 * seed + number)
    return Family(folder / "fine-tunes", made.bundle, made.base, found)


def prompts(count: int, seed: int = 0) -> list[str]:
    """Short prompts, all different."""
    draw = random.Random(seed)
    return [f"{number}: {' '.join(draw.choices(_WORDS, k=draw.randint(2, 6)))}" for number in range(count)]


_WORDS = ("river", "candle", "green", "seven", "mountain", "quiet", "paper", "orbit", "lemon", "stone")
