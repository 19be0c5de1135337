"""What is compared: each method as weight changes on the bare base, one set for each task.

Static merges answer every task with the same weights; Twin with oracle gates and the truncated
task vector have weights of their own for each task.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from experts.checkpoint import Checkpoint, FineTune
from experts.compression import exclusive_delta, truncated_svd
from experts.factors import Delta, LowRank, SvdFactors, dense
from experts.merging import DareTies, MergeMethod, TaskArithmetic, Ties, merge

Changes = Iterable[tuple[str, Delta | None]]


@dataclass(frozen=True)
class Candidate:
    """A method with its hyper-parameters.

    `shared` says that all tasks use the same weights, so the model is patched once.
    `changes(task)` are the weight changes for a task; `expert_bytes` what one expert stores.
    """

    name: str
    note: str
    shared: bool
    expert_bytes: int
    changes: Callable[[str], Changes]


def bare_base() -> Candidate:
    """θ₀ itself."""
    return Candidate("base", "no expert", True, 0, lambda task: ())


def expert_alone(base: Checkpoint, fine_tunes: Mapping[str, FineTune]) -> Candidate:
    """Each task by its own fine-tune: the yardstick."""

    def changes(task: str) -> Changes:
        return ((name, fine_tunes[task].delta(name)) for name in base.names)

    return Candidate("expert alone", "each task by its own", False, 0, changes)


def static_merge(
    name: str, base: Checkpoint, fine_tunes: Sequence[FineTune], method: MergeMethod
) -> Candidate:
    """One merged model for all tasks."""
    settings = method.model_dump(exclude={"method"})
    note = ", ".join(f"{key} {value}" for key, value in settings.items())
    return Candidate(name, note, True, 0, lambda task: merge(base, fine_tunes, method))


def truncated(base: Checkpoint, fine_tunes: Mapping[str, FineTune], rank: int) -> Candidate:
    """θ₀ + SVD_r(δ_t): Twin's ablation without a shared expert."""

    def factors(task: str) -> Iterator[SvdFactors | None]:
        return (cut(fine_tunes[task].delta(name), rank) for name in base.names)

    def changes(task: str) -> Changes:
        return zip(base.names, map(product, factors(task)), strict=True)

    size = max(stored_bytes(factors(task)) for task in fine_tunes)
    return Candidate(f"truncated task vector r={rank}", "no shared expert", False, size, changes)


def twin_oracle(
    base: Checkpoint, fine_tunes: Mapping[str, FineTune], method: MergeMethod, rank: int
) -> Candidate:
    """θ* + SVD_r(θ_t − θ*), the task's own expert with gate 1."""
    shared = dict(merge(base, list(fine_tunes.values()), method))

    def exclusive(task: str) -> Iterator[SvdFactors | None]:
        for name in base.names:
            yield cut(exclusive_delta(fine_tunes[task].delta(name), shared[name]), rank)

    def changes(task: str) -> Changes:
        for name, factors in zip(base.names, exclusive(task), strict=True):
            yield name, added(shared[name], product(factors))

    size = max(stored_bytes(exclusive(task)) for task in fine_tunes)
    note = f"oracle gates, shared: {method.method}"
    return Candidate(f"Twin r={rank}", note, False, size, changes)


def grid(kind: str) -> tuple[MergeMethod, ...]:
    """The hyper-parameters tried for a static method; validation chooses."""
    scales = (0.2, 0.3, 0.5, 0.7, 1.0)
    if kind == "task-arithmetic":
        return tuple(TaskArithmetic(scale=scale) for scale in scales)
    if kind == "ties":
        return tuple(Ties(density=0.2, scale=scale) for scale in (0.5, 1.0, 1.5, 2.0))
    if kind == "dare-ties":
        return tuple(DareTies(drop_rate=0.5, density=0.2, scale=s) for s in (0.5, 1.0, 1.5, 2.0))
    raise ValueError(f"no grid for {kind!r}; one of task-arithmetic, ties, dare-ties")


def cut(change: Delta | None, rank: int) -> SvdFactors | None:
    """The best rank-r approximation as it would be stored: U and Vh in bf16, S in float32."""
    return None if change is None else truncated_svd(change, rank, dtype=torch.bfloat16)


def product(factors: SvdFactors | None) -> LowRank | None:
    """Stored factors as a change of weights."""
    return None if factors is None else LowRank(factors.U.float() * factors.S, factors.Vh.float())


def added(left: Delta | None, right: Delta | None) -> Delta | None:
    """The sum of two changes."""
    if left is None or right is None:
        return right if left is None else left
    return dense(left) + dense(right)


def stored_bytes(factors: Iterable[SvdFactors | None]) -> int:
    """True bytes of an expert's factors."""
    return sum(each.nbytes for each in factors if each is not None)
