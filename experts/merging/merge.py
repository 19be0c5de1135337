"""Stream a whole model through a merge method: one parameter of each fine-tune in memory at a time."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from experts.checkpoint import Checkpoint, FineTune
from experts.errors import MergeError
from experts.factors import Delta, LowRank, dense
from experts.merging.averaging import average
from experts.merging.dare import dare, dare_generator
from experts.merging.methods import Averaging, Dare, DareTies, MergeMethod, TaskArithmetic, Ties
from experts.merging.task_arithmetic import task_arithmetic
from experts.merging.threshold import streamed_threshold
from experts.merging.ties import ties

Progress = Callable[[str], None]


def merge(
    base: Checkpoint,
    fine_tunes: Sequence[FineTune],
    method: MergeMethod,
    progress: Progress | None = None,
) -> Iterator[tuple[str, Delta | None]]:
    """θ* − θ₀, parameter by parameter in the base's order.

    Args:
        base: θ₀.
        fine_tunes: at least one, each name once.
        method: which merge, with all its hyper-parameters.
        progress: called with a line for each parameter done, threshold passes included.

    Returns:
        An iterator over every parameter of the base: float32; `LowRank` (the fine-tunes' factors side by
        side) where the method is linear and every change of the parameter is low-rank; None where no
        fine-tune touches it.

    Raises:
        MergeError: no fine-tunes, a name twice, or a change that is not finite. The first two come from
            the call, the last from the iterator.
    """
    names = [fine_tune.name for fine_tune in fine_tunes]
    if not names:
        raise MergeError("there is nothing to merge; give at least one fine-tune")
    if len(set(names)) != len(names):
        raise MergeError(f"two fine-tunes have one name: {', '.join(sorted(names))}; give each its own")
    return _stream(base, tuple(fine_tunes), method, progress or (lambda line: None))


def _stream(
    base: Checkpoint, fine_tunes: Sequence[FineTune], method: MergeMethod, progress: Progress
) -> Iterator[tuple[str, Delta | None]]:
    thresholds = [_threshold(base, fine_tune, method, progress) for fine_tune in fine_tunes]
    for name in base.names:
        yield name, _merge_one(fine_tunes, thresholds, method, name)
        progress(name)


def _merge_one(
    fine_tunes: Sequence[FineTune], thresholds: Sequence[float], method: MergeMethod, name: str
) -> Delta | None:
    """One parameter merged; None where no fine-tune touches it."""
    changes = [_finite_delta(fine_tune, name) for fine_tune in fine_tunes]
    touched = [change for change in changes if change is not None]
    if not touched:
        return None
    if isinstance(method, Averaging | TaskArithmetic):
        low_rank = [change for change in touched if isinstance(change, LowRank)]
        if len(low_rank) == len(touched):
            return _weighted_sum(low_rank, _scale(method, len(fine_tunes)))
    vectors = [
        None if change is None else _prepared(change, fine_tune, method, name)
        for change, fine_tune in zip(changes, fine_tunes, strict=True)
    ]
    del changes
    zero = torch.zeros(touched[0].shape)
    deltas = [zero if vector is None else vector for vector in vectors]
    match method:
        case Averaging():
            return average(deltas)
        case TaskArithmetic() | Dare():
            return task_arithmetic(deltas, method.scale)
        case Ties() | DareTies():
            return ties(deltas, thresholds, method.scale)


def _scale(method: Averaging | TaskArithmetic, count: int) -> float:
    return 1 / count if isinstance(method, Averaging) else method.scale


def _weighted_sum(changes: Sequence[LowRank], weight: float) -> LowRank:
    """Give weight · Σ up_t·down_t as one product: [up_1 … up_T]·weight times the stacked downs."""
    up = torch.cat([change.up for change in changes], dim=1)
    return LowRank(up * weight, torch.cat([change.down for change in changes], dim=0))


def _prepared(change: Delta, fine_tune: FineTune, method: MergeMethod, name: str) -> Tensor:
    """A change as the method's merging step takes it: dense, and for DARE sparsified."""
    if isinstance(method, Dare | DareTies):
        return dare(dense(change), method.drop_rate, dare_generator(method.seed, fine_tune.name, name))
    return dense(change)


def _threshold(base: Checkpoint, fine_tune: FineTune, method: MergeMethod, progress: Progress) -> float:
    """TIES' trimming threshold of one whole task vector; 0, which keeps all, for the other methods.

    The task vector's length is that of the parameters that the fine-tune touches: what it trained.
    """
    if not isinstance(method, Ties | DareTies) or method.density == 1:
        return 0.0

    def pieces() -> Iterable[Tensor]:
        for name in base.names:
            change = _finite_delta(fine_tune, name)
            if change is not None:
                yield _prepared(change, fine_tune, method, name)
            progress(f"{fine_tune.name}: trimming threshold: {name}")

    return streamed_threshold(pieces, method.density)


def _finite_delta(fine_tune: FineTune, name: str) -> Delta | None:
    change = fine_tune.delta(name)
    parts = (change.up, change.down) if isinstance(change, LowRank) else (change,)
    if any(part is not None and not torch.isfinite(part).all() for part in parts):
        raise MergeError(f"{fine_tune.name} ({fine_tune.path}): {name} has NaN or Inf; train it again")
    return change
