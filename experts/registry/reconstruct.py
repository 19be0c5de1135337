"""A family's base and fine-tunes as its bundle knows them, for whoever merges them anew."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from experts.bundle import Bundle
from experts.bundle_expert import ExpertWeights, read_expert
from experts.bundle_manifest import ExpertSource
from experts.checkpoint import Checkpoint, FineTune, open_fine_tune, write_checkpoint
from experts.checkpoint.mark import read_mark
from experts.compression import CompressionSpec
from experts.errors import MismatchError
from experts.factors import Delta, added, negative


@dataclass(frozen=True)
class Member:
    """One expert of the family, as it serves now.

    Attributes:
        files: folder of its expert.safetensors and expert.json, against the shared expert of before.
        source: what it came from, for the manifest.
        origin: folder of the fine-tune as it came; None where it was not kept.
        compression: how it is compressed; the bundle's own way if not given.
        prompts: what it is for; fewer than 8 are too few for the router, which then knows it by its weights.
    """

    name: str
    files: Path
    source: ExpertSource
    origin: Path | None = None
    compression: CompressionSpec | None = None
    prompts: tuple[str, ...] = ()


class Reconstructed:
    """A fine-tune as the bundle knows it; see `FineTune`."""

    def __init__(self, member: Member, bundle: Bundle) -> None:
        self.name = member.name
        self.path = member.files
        self.files = (member.files / "expert.safetensors",)
        self._bundle = bundle

    @cached_property
    def _weights(self) -> ExpertWeights:
        return read_expert(self.path, self.name, 1)

    def touched(self) -> frozenset[str]:
        """Names of the parameters that differ from the base."""
        return frozenset(name for name in self._bundle.shared.names if self.delta(name) is not None)

    def delta(self, name: str) -> Delta | None:
        """θ_t − θ₀ of one parameter: what the merge changed, and the expert's own."""
        own: Delta | None = self._weights.exact.get(name)
        factors = self._weights.factors.get(name)
        if factors is not None and factors.rank:
            own = added(factors.low_rank(), own)
        return added(self._bundle.base_delta.delta(name), own)

    def tensor(self, name: str) -> Tensor | None:
        """None: only differences are known."""
        self._bundle.shared.stored(name)
        return None


@contextmanager
def base_of(
    bundle: Bundle, folder: Path | None, beside: Path, step: Callable[[int, str], None]
) -> Iterator[Checkpoint]:
    """The base's own folder, or one that is worked out and removed in the end.

    Args:
        folder: of the base; None works it out.
        beside: where there is room for it.
        step: called with how many parameters are worked out, and the last one's name.

    Raises:
        MismatchError: the folder is not the base that the bundle was made from.
    """
    if folder is not None:
        base = Checkpoint.open(folder)
        if base.fingerprint() != bundle.manifest.base.fingerprint:
            raise MismatchError(
                f"{folder} is not the base that bundle {bundle.manifest.name!r} was made from; leave it out, and the "
                "base is worked out from the bundle"
            )
        yield base
        return
    with TemporaryDirectory(dir=beside, prefix=".base-") as scratch:
        write_checkpoint(bundle.shared.streamed(), _back(bundle, step), Path(scratch))
        yield Checkpoint.open(Path(scratch))


def _back(bundle: Bundle, step: Callable[[int, str], None]) -> Iterator[tuple[str, Delta | None]]:
    for done, name in enumerate(bundle.shared.names, start=1):
        delta = bundle.base_delta.delta(name)
        yield name, None if delta is None else negative(delta)
        step(done, name)


def opened(member: Member, bundle: Bundle, base: Checkpoint) -> FineTune:
    """θ_t against a base. What was a change of the old shared expert is one of the base by the bundle alone."""
    if member.origin is None or read_mark(member.origin) is not None:
        return Reconstructed(member, bundle)
    return open_fine_tune(member.name, member.origin, base)
