"""Stream a whole model through a merge method: one parameter of each fine-tune in memory at a time."""

from collections.abc import Iterator, Sequence

from experts.checkpoint import Checkpoint, FineTune
from experts.errors import MergeError
from experts.factors import Delta, LowRank
from experts.merging.cache import MergeCache
from experts.merging.entrywise import merge_entries
from experts.merging.family import Family, Progress
from experts.merging.iso_c import iso_c
from experts.merging.low_rank import total
from experts.merging.methods import (
    Averaging,
    DareTies,
    IsoC,
    MergeMethod,
    ModelStock,
    TaskArithmetic,
    Ties,
    TsvMerge,
)
from experts.merging.model_stock import inner_products, model_stock_ratio
from experts.merging.tsv import tsv


def merge(
    base: Checkpoint,
    fine_tunes: Sequence[FineTune],
    method: MergeMethod,
    progress: Progress | None = None,
    cache: MergeCache | None = None,
) -> Iterator[tuple[str, Delta | None]]:
    """θ* − θ₀, parameter by parameter in the base's order.

    Args:
        base: θ₀.
        fine_tunes: at least one, each name once.
        method: which merge, with all its hyper-parameters.
        progress: called with a line for each parameter done, threshold passes included.
        cache: what earlier merges of these fine-tunes found out; None to keep nothing.

    Returns:
        An iterator over every parameter of the base: float32; `LowRank` where every change of the parameter
        is low-rank and the method is linear in them, and from the methods that work on singular vectors;
        None where no fine-tune touches it.

    Raises:
        MergeError: no fine-tunes, a name twice, or a change that is not finite. The first two come from
            the call, the last from the iterator.
    """
    names = [fine_tune.name for fine_tune in fine_tunes]
    if not names:
        raise MergeError("there is nothing to merge; give at least one fine-tune")
    if len(set(names)) != len(names):
        raise MergeError(f"two fine-tunes have one name: {', '.join(sorted(names))}; give each its own")
    progress = progress or (lambda line: None)
    family = Family(base, fine_tunes, cache or MergeCache(keep_products=False), progress)
    return _stream(family, method, progress)


def _stream(family: Family, method: MergeMethod, progress: Progress) -> Iterator[tuple[str, Delta | None]]:
    thresholds: Sequence[float] = ()
    if isinstance(method, DareTies) or (isinstance(method, Ties) and method.trim == "model"):
        thresholds = family.trimming_thresholds(method)
    for name in family.base.names:
        yield name, _merge_one(family, thresholds, method, name)
        progress(name)


def _merge_one(family: Family, thresholds: Sequence[float], method: MergeMethod, name: str) -> Delta | None:
    """One parameter merged; None where no fine-tune touches it."""
    changes = family.changes(name)
    touched = [change for change in changes if change is not None]
    if not touched:
        return None
    count = len(family)
    shape = tuple(touched[0].shape)
    match method:
        case Averaging():
            return total(touched, 1 / count)
        case TaskArithmetic():
            return total(touched, method.scale)
        case ModelStock():
            # A fine-tune that leaves the parameter is at right angles to the others.
            ratio = model_stock_ratio(inner_products(touched), count)
            return total(touched, ratio / count)
        case TsvMerge() | IsoC() if len(shape) != 2:
            return total(touched, method.scale / count)
        case TsvMerge():
            rank = max(1, int(min(shape) * (method.fraction or 1 / count) + 1e-6))
            return _compact(tsv(touched, rank, method.scale))
        case IsoC():
            return _compact(iso_c(touched, method.scale))
        case _:
            return merge_entries(family, changes, thresholds, method, name, shape)


def _compact(delta: LowRank) -> Delta:
    """Products no smaller than the matrix itself are multiplied out."""
    rows, columns = delta.shape
    return delta.dense() if delta.rank * (rows + columns) >= rows * columns else delta
