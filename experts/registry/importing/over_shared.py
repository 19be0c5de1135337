"""A source that is a change of the shared expert: its exclusive vector is known without any subtraction."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from experts.bundle import Bundle
from experts.compression import CompressedExpert
from experts.factors import Delta, added


class OverShared:
    """v_t itself. To those who ask as of any fine-tune, its δ against the base; see `FineTune`.

    Attributes:
        kept: the expert exactly as it was exported; None where it was changed since, or never was an expert.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        bundle: Bundle,
        exclusive: Callable[[str], Delta | None],
        files: tuple[Path, ...],
        kept: CompressedExpert | None,
    ) -> None:
        self.name = name
        self.path = path
        self.files = files
        self.kept = kept
        self._bundle = bundle
        self._exclusive = exclusive

    def exclusive(self, name: str) -> Delta | None:
        """v_t = θ_t − θ* of one parameter, float32."""
        return self._exclusive(name)

    def touched(self) -> frozenset[str]:
        """Names of the parameters that differ from the base."""
        return frozenset(name for name in self._bundle.shared.names if self.delta(name) is not None)

    def delta(self, name: str) -> Delta | None:
        """θ_t − θ₀ of one parameter: v_t and what the merge changed."""
        return added(self.exclusive(name), self._bundle.base_delta.delta(name))

    def tensor(self, name: str) -> Tensor | None:
        """None: only differences are known."""
        self._bundle.shared.stored(name)
        return None
