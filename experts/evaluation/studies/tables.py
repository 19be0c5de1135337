"""Twin-Merging's tables (arXiv 2406.15479, section 4) for any family of experts.

Studies: "tables" (methods), "ablations" (of the shared expert), "sparsity" (the paper's sparsity s keeps the (1 − s)
part of a matrix's singular values; true bytes stand beside it), "count" (number of experts), "unseen" (each task
answered without its expert).
"""

from dataclasses import dataclass

from experts.checkpoint import Checkpoint
from experts.compression import CompressionSpec
from experts.evaluation.changes import SharedPlan
from experts.evaluation.jobs import Job
from experts.evaluation.runner import Unit
from experts.evaluation.setting import Setting
from experts.evaluation.studies.grids import METHODS, grid
from experts.evaluation.studies.options import Options, Settings
from experts.evaluation.systems import (
    Adapter,
    Base,
    NoShared,
    OneExpert,
    RouterPlan,
    Static,
    System,
    Twin,
)
from experts.merging import Averaging, TaskArithmetic, Ties, TsvMerge

SPARSITIES = (0.0, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)
TWIN_SCALES = (0.1, 0.2, 0.3)
ONE_PERCENT = 0.01


@dataclass(frozen=True)
class Maker:
    """Jobs of one setting's own experts.

    Attributes:
        experts: those of the family, in its order.
    """

    setting: Setting
    options: Options
    experts: tuple[str, ...]

    def job(
        self,
        study: str,
        row: str,
        *candidates: System,
        experts: tuple[str, ...] | None = None,
        tasks: tuple[str, ...] | None = None,
    ) -> Job:
        """A row over all experts and their tasks unless others are named."""
        chosen = self.experts if experts is None else experts
        return Job(
            study,
            self.setting.name,
            row,
            candidates,
            chosen,
            chosen if tasks is None else tasks,
            self.options.items,
            self.options.validation,
        )

    @property
    def router(self) -> RouterPlan:
        """The router of every routed row."""
        return RouterPlan(prompts=self.options.prompts, guard=self.options.guard)

    @property
    def rank(self) -> CompressionSpec:
        """The compression of every row that does not vary it."""
        return CompressionSpec(rank=self.options.rank)

    @property
    def shared(self) -> TaskArithmetic:
        """The shared expert of every row that does not vary it."""
        return TaskArithmetic(scale=self.options.scale)


def plan(settings: Settings, options: Options) -> list[Unit]:
    """All rows of the first setting."""
    setting = next(iter(settings.values()))
    make = Maker(setting, options, tuple(setting.experts))
    return [*methods(make), *ablations(make), *sparsity(make), *count(make), *unseen(make)]


def methods(make: Maker) -> list[Unit]:
    """Static merges, the multi-task model, and Twin."""
    units: list[Unit] = [
        (make.job("tables", method, *(Static(method=each) for each in grid(method))),) for method in METHODS
    ]
    for name in make.setting.adapters:
        units.append((make.job("tables", name, Adapter(name=name), tasks=tuple(make.setting.tasks)),))
    scales = tuple(TaskArithmetic(scale=scale) for scale in TWIN_SCALES)
    small = _one_percent(make)
    router = make.router
    units.append((
        make.job("tables", "Twin, oracle", *(Twin(shared=each, compression=make.rank) for each in scales)),
        make.job("tables", "Twin, router",
                 *(Twin(shared=each, compression=make.rank, router=router) for each in scales)),
    ))  # fmt: skip
    units.append((
        make.job("tables", "Twin, paper's router",
                 Twin(shared=make.shared, compression=make.rank, router=RouterPlan(router="mlp", prompts=200))),
    ))  # fmt: skip
    units.append((
        make.job("tables", "Twin at 1 %, oracle", *(Twin(shared=make.shared, compression=each) for each in small)),
        make.job("tables", "Twin at 1 %, router",
                 *(Twin(shared=make.shared, compression=each, router=router) for each in small)),
    ))  # fmt: skip
    return units


def ablations(make: Maker) -> list[Unit]:
    """Other shared experts, and none; with oracle and with router."""
    plans: dict[str, SharedPlan] = {
        "no shared expert": NoShared(),
        "one expert as shared": OneExpert(name=make.experts[0]),
        "averaging as shared": Averaging(),
        "task arithmetic as shared": make.shared,
        "TSV as shared": TsvMerge(),
    }
    return [
        (
            make.job("ablations", f"{name}, oracle", Twin(shared=shared, compression=make.rank)),
            make.job("ablations", f"{name}, router", Twin(shared=shared, compression=make.rank, router=make.router)),
        )
        for name, shared in plans.items()
    ]  # fmt: skip


def sparsity(make: Maker) -> list[Unit]:
    """Twin with oracle gates at the paper's sparsities of an exclusive vector."""
    ranks: dict[int, float] = {}
    for share in SPARSITIES:
        ranks[max(1, round((1 - share) * _matrix_rank(make.setting)))] = share
    units: list[Unit] = []
    for rank, share in ranks.items():
        twin = Twin(shared=make.shared, compression=CompressionSpec(rank=rank))
        units.append((make.job("sparsity", f"{100 * share:g} %", twin),))
    return units


def count(make: Maker) -> list[Unit]:
    """The first 2, 4, … experts of the family."""
    units: list[Unit] = []
    for number in make.options.counts:
        chosen = make.experts[:number]
        if len(chosen) < number:
            continue
        merges = {
            "task-arithmetic": grid("task-arithmetic"),
            "ties": tuple(Ties(scale=s) for s in (0.5, 1.0, 1.5)),
        }
        for row, candidates in merges.items():
            units.append(
                (make.job("count", row, *(Static(method=each) for each in candidates), experts=chosen),)
            )
        twin = Twin(shared=make.shared, compression=make.rank)
        units.append((
            make.job("count", "Twin, oracle", twin, experts=chosen),
            make.job("count", "Twin, router", twin.model_copy(update={"router": make.router}), experts=chosen),
        ))  # fmt: skip
    return units


def unseen(make: Maker) -> list[Unit]:
    """Each task answered without its expert, by the others."""
    units: list[Unit] = []
    for left_out in make.experts:
        others = tuple(name for name in make.experts if name != left_out)
        if not others:
            continue
        rows: dict[str, System] = {
            "base": Base(),
            "averaging": Static(method=Averaging()),
            "task-arithmetic": Static(method=make.shared),
            "Twin, router": Twin(shared=make.shared, compression=make.rank, router=make.router),
        }
        units.append(
            tuple(
                make.job("unseen", row, system, experts=others, tasks=(left_out,))
                for row, system in rows.items()
            )
        )
    return units


def _one_percent(make: Maker) -> tuple[CompressionSpec, ...]:
    """What fits into 1 % of the base's bytes, in each form that may be best there."""
    budget = int(ONE_PERCENT * Checkpoint.open(make.setting.base).nbytes)
    return tuple(CompressionSpec(budget_bytes=budget, dtype=dtype) for dtype in ("bfloat16", "int8", "mixed"))


def _matrix_rank(setting: Setting) -> int:
    """The rank of most matrices of the base: its hidden size."""
    return int(Checkpoint.open(setting.base).config["hidden_size"])
