"""What merges of the same fine-tunes have in common, for studies that make hundreds of them."""

from collections.abc import Callable
from typing import TypeVar

from experts.checkpoint import FineTune
from experts.factors import Delta, LowRank

T = TypeVar("T")


class MergeCache:
    """Thresholds and LoRA factors of the fine-tunes of one base, kept from merge to merge.

    Dense changes are read again each time. A fine-tune is known by its name and folder; one that is
    trained anew needs a new cache.
    """

    def __init__(self, keep_products: bool = True) -> None:
        """An empty cache.

        Args:
            keep_products: hold the factors too, about the size of the adapters; else thresholds only.
        """
        self._keep_products = keep_products
        self._values: dict[tuple[object, ...], object] = {}

    def remember(self, fine_tune: FineTune, key: tuple[object, ...], make: Callable[[], T]) -> T:
        """The value under `key` of that fine-tune, made on the first call."""
        full = (fine_tune.name, fine_tune.path, *key)
        if full not in self._values:
            self._values[full] = make()
        return self._values[full]  # type: ignore[return-value]

    def delta(self, fine_tune: FineTune, name: str, read: Callable[[], Delta | None]) -> Delta | None:
        """The change of one parameter; kept where it is a product or nothing."""
        full = (fine_tune.name, fine_tune.path, "delta", name)
        if full in self._values:
            return self._values[full]  # type: ignore[return-value]
        change = read()
        if self._keep_products and (change is None or isinstance(change, LowRank)):
            self._values[full] = change
        return change
